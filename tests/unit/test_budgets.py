"""The pure planner: formulas, precedence, every hard limit with a fix, messages with numbers."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest

from moe_plugin.backends.deepep import DEEPEP_LIMITS, TORCH_LIMITS
from moe_plugin.batched_backend import Capability
from moe_plugin.errors import BudgetError, ConfigError, UnsupportedError
from moe_plugin.planning.facts import LaunchFacts, ModelFacts
from moe_plugin.planning.limits import Limits
from moe_plugin.planning.memory import allocated, handle_sizes
from moe_plugin.planning.plan import Plan, Rejection, refusal
from moe_plugin.planning.planner import make_plan
from moe_plugin.planning.report import render

V3 = ModelFacts(
    architecture="DeepseekV3ForCausalLM",
    hidden_size=7168,
    num_experts=256,
    top_k=8,
    moe_intermediate_size=2048,
    context_length=163840,
    weight_format="fp8_block",
)
QWEN = ModelFacts(
    architecture="Qwen3MoeForCausalLM",
    hidden_size=2048,
    num_experts=128,
    top_k=8,
    moe_intermediate_size=768,
    context_length=40960,
)


T_FLAG = "--batched-dp-moe-max-tokens"
T_VARIABLE = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"


def plan(model: ModelFacts = V3, limits: Limits = DEEPEP_LIMITS, /, **launch: object) -> Plan:
    """A plan for an H100 with the given launch facts."""
    return make_plan(model, LaunchFacts(**launch), limits)  # type: ignore[arg-type]


def one_error(found: Plan) -> Rejection:
    """The only rejection; it names a fix and carries it for programs."""
    assert len(found.errors) == 1, [str(error) for error in found.errors]
    assert found.errors[0].fix
    assert found.errors[0].changes
    return found.errors[0]


@pytest.mark.parametrize(
    ("tp", "dp", "width", "chunk", "prefill", "decode", "running"),
    [
        (1, 1, 1, 256, 256, 256, 256),
        (8, 8, 1, 2048, 256, 256, 2048),
        (8, 1, 1, 2048, 2048, 2048, 2048),
        (8, 2, 1, 2048, 1024, 1024, 2048),
        (8, 8, 4, 2048, 256, 64, 512),
        (16, 16, 1, 4096, 256, 256, 4096),
        (16, 4, 2, 4096, 1024, 512, 2048),
        (8, 8, 3, 2048, 256, 80, 640),  # 85 requests fit; captured batches are multiples of 8
    ],
)
def test_defaults_follow_from_tokens_per_rank(
    tp: int, dp: int, width: int, chunk: int, prefill: int, decode: int, running: int
) -> None:
    """chunk = T x tp; prefill graph = T x attn_tp; decode = T x attn_tp // width; x dp."""
    found = plan(tp_size=tp, attn_dp_size=dp, draft_width=width)
    assert found.verdict == "ok"
    assert found.max_dispatch_tokens_per_rank == 256
    assert found.chunked_prefill_size == chunk
    assert found.cuda_graph_max_bs_prefill == prefill
    assert found.cuda_graph_max_bs_decode == decode
    assert found.max_running_requests == running


def test_precedence_flag_variable_derived_default() -> None:
    """And where each came from is on the plan."""
    assert plan().budgets[0].source == "default"
    assert plan(chunked_prefill_size=512).budgets[0].source == "derived"
    assert plan(QWEN, host_tokens_per_rank=64).max_dispatch_tokens_per_rank == 64
    assert plan(QWEN, host_tokens_per_rank=64, max_tokens=64).verdict == "ok"
    refused = plan(QWEN, host_tokens_per_rank=64, max_tokens=128)
    assert refused.max_dispatch_tokens_per_rank == 128
    assert one_error(refused).changes == ((DEEPEP_LIMITS.tokens_variable, None),)


def test_a_small_capacity_refuses_a_large_chunk_with_the_users_own_numbers() -> None:
    """Limit, arithmetic, flag and a value that works."""
    error = one_error(plan(tp_size=8, attn_dp_size=2, max_tokens=128, chunked_prefill_size=8192))
    assert error.got == (
        "--chunked-prefill-size 8192 // 2 DP groups / 4 attention-TP ranks = 1024 rows per rank"
    )
    assert error.allowed == "<= 128 (tokens per rank)"
    assert error.fix == "--chunked-prefill-size 1024"


def test_chunking_off_is_bounded_by_the_context_only() -> None:
    """Also when the DP division turns it off."""
    assert "40960 tokens" in one_error(plan(QWEN, chunked_prefill_size=-1)).got
    error = one_error(plan(QWEN, tp_size=8, attn_dp_size=8, chunked_prefill_size=7))
    assert "7 // 8 DP groups = 0" in error.got
    assert plan(QWEN, chunked_prefill_size=-1, disaggregation_mode="decode").verdict == "ok"


def test_fp4_experts_run_on_blackwell_and_hopper() -> None:
    """On the host's DeepGEMM, within our budgets; on Hopper on ours."""
    for capability, runner in (((10, 0), "host"), ((9, 0), "moe_plugin")):
        found = plan(replace(V3, weight_format="fp8_fp4"), compute_capability=capability)
        assert (found.verdict, found.runner) == ("ok", runner)


def test_two_batch_overlap_holds_two_batches() -> None:
    """Rows of one are received while the other's are computed; the experts take turns."""
    one, two = plan(QWEN), plan(QWEN, two_batch_overlap=True)
    rows = 256 * 128
    tensors = (rows * 2048 * 2, rows * 2048 * 2, *handle_sizes(rows, 128, 128))
    second = sum(map(allocated, tensors))
    assert two.workspace_bytes - one.workspace_bytes == second


def test_suggested_capacities_suit_fp8_rows() -> None:
    """Nine draft tokens need 18 rows on each of 8 ranks: the next T is 32, not 24."""
    launch = {"tp_size": 8, "draft_width": 9, "two_batch_overlap": True}
    fixes = [error.fix for error in plan(V3, host_tokens_per_rank=1, **launch).errors]
    assert any("--batched-dp-moe-max-tokens 32" in fix for fix in fixes), fixes
    assert not any("24" in fix for fix in fixes), fixes


def test_a_capacity_that_both_name_is_fixed_in_both_places() -> None:
    """Changing the flag alone would leave two values that differ."""
    error = one_error(plan(max_tokens=100, host_tokens_per_rank=100))
    assert error.changes == (
        ("--batched-dp-moe-max-tokens", "128"),
        (DEEPEP_LIMITS.tokens_variable, None),
    )


def test_refusals_are_complete() -> None:
    """Fixing the mode bounds prefill, which the chunk then breaks: both are named at once."""
    given = {"deepep_mode": "auto", "has_deep_gemm": False, "chunked_prefill_size": 8192}
    found = plan(QWEN, host_tokens_per_rank=128, **given)
    assert [error.limit for error in found.errors] == [
        "experts for prefill",
        "rows per rank and forward",
    ]


@pytest.mark.parametrize("weights", ["fp8_tensor", "unquantized"])
def test_host_runner_where_it_works(weights: str) -> None:
    """Explicit DeepGEMM keeps the host's experts inside our budgets."""
    model, asked = replace(QWEN, weight_format=weights), {"moe_runner_backend": "deep_gemm"}
    found = plan(model, **asked)
    assert (found.verdict, found.runner) == ("ok", "host")
    assert plan(model, **asked, has_deep_gemm=False).verdict == "refused"
    assert plan(model, **asked, compute_capability=(8, 0)).verdict == "refused"


@pytest.mark.parametrize("weights", ["fp8_tensor", "compressed-tensors_fp8", "w8a8_fp8"])
@pytest.mark.parametrize("act", ["silu", "silu, limited", "silu, clamped"])
def test_every_fp8_format_runs_on_ours(weights: str, act: str) -> None:
    """Rows in FP8, scaled per 128 channels."""
    found = plan(replace(QWEN, weight_format=weights, hidden_act=act))
    assert (found.verdict, found.runner) == ("ok", "moe_plugin")


def test_our_experts_need_no_deep_gemm() -> None:
    """FP8 blocks and bf16 run on ours, also on Ampere."""
    for model in (QWEN, V3):
        found = plan(model, has_deep_gemm=False, compute_capability=(8, 0))
        assert (found.verdict, found.runner) == ("ok", "moe_plugin")


def test_torch_transport_takes_any_shape() -> None:
    """Small models on CPU: hidden 256, fp32, any top-k; no buffer, no queue pairs."""
    small = ModelFacts(
        hidden_size=256, num_experts=16, top_k=4, moe_intermediate_size=64, context_length=2048,
        dtype="float32",
    )  # fmt: skip
    found = plan(
        *(small, TORCH_LIMITS), tp_size=2, attn_dp_size=2, device="cpu", transport="torch",
        compute_capability=None, decode_graphs=False, prefill_graphs=False,
    )  # fmt: skip
    assert found.verdict == "ok"
    assert (found.rdma_buffer_bytes, found.nvshmem_qp_depth) == (0, 0)
    assert (found.cuda_graph_max_bs_decode, found.cuda_graph_max_bs_prefill) == (0, 0)
    assert found.chunked_prefill_size == 512


def test_explicit_queue_pair_depth_is_reported_when_the_host_raises_it() -> None:
    """It wins when it is large enough; the host silently raises it otherwise."""
    assert plan(qp_depth=4096).nvshmem_qp_depth == 4096
    raised = plan(qp_depth=128)
    assert raised.nvshmem_qp_depth == 1024
    assert any("NVSHMEM_QP_DEPTH=128" in note for note in raised.notes)
    depth = next(budget for budget in raised.budgets if budget.name == "nvshmem_qp_depth")
    assert depth.source == "host"


def test_redundant_experts_count_physically() -> None:
    """EPLB copies need buffer and workspace like any other expert."""
    found = plan(tp_size=32, attn_dp_size=32, redundant_experts=32)
    assert found.num_experts == 288
    assert found.rdma_buffer_bytes > plan(tp_size=32, attn_dp_size=32).rdma_buffer_bytes


def test_attention_tp_is_not_paid_for_tenfold() -> None:
    """One DP group of 8 ranks scatters: the buffer is the same, the budgets are eight times."""
    flat, scattered = plan(tp_size=8, attn_dp_size=8), plan(tp_size=8, attn_dp_size=1)
    assert flat.rdma_buffer_bytes == scattered.rdma_buffer_bytes
    assert scattered.cuda_graph_max_bs_prefill == 8 * flat.cuda_graph_max_bs_prefill


def test_context_parallel_ranks_do_not_divide_rows() -> None:
    """The host shards a chunk over them only when it can; a batch may stay whole."""
    found = plan(tp_size=8, attn_cp_size=8)
    assert found.attn_tp_size == 1
    assert found.chunked_prefill_size == 256


def test_dynamic_chunking_stays_below_its_growth() -> None:
    """It probes at 1.25 times the chunk and grows up to --max-prefill-tokens."""
    launch = {"pp_size": 2, "tp_size": 8, "dynamic_chunking": True}
    assert one_error(plan(**launch)).fix == "--max-prefill-tokens 2048"
    found = plan(**launch, max_prefill_tokens=2048)
    assert found.verdict == "ok"
    assert found.chunked_prefill_size * 5 // 4 <= 2048


def test_decode_graphs_do_not_outgrow_the_hosts_own() -> None:
    """A larger T raises running requests, not the host's memory reserve per captured request."""
    found = plan(tp_size=8, attn_dp_size=8, max_tokens=1024)
    assert found.cuda_graph_max_bs_decode == 512
    assert found.max_running_requests == 8192


def test_a_page_that_no_t_holds_asks_for_a_smaller_page() -> None:
    """A larger T helps up to DeepEP's 1,024 rows; beyond, only the page can change."""
    flat = {"tp_size": 8, "attn_dp_size": 8}
    assert one_error(plan(**flat, page_size=512)).changes == ((T_FLAG, "512"),)
    error = one_error(plan(**flat, page_size=2048))
    assert "--page-size 2048" in error.got
    assert error.changes == (("--page-size", "256"),)
    assert plan(**flat, page_size=256).verdict == "ok"
    assert plan(tp_size=8, page_size=2048).verdict == "ok"  # eight ranks hold it together


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_graphs_of_size_zero_are_refused_and_not_filled(phase: str) -> None:
    """The host keeps graphs on, and asserts that it has something to capture."""
    error = one_error(plan(**{f"cuda_graph_max_bs_{phase}": 0}))
    flag, off = f"--cuda-graph-max-bs-{phase}", f"--disable-{phase}-cuda-graph"
    assert error.changes == ((flag, None), (off, ""))
    assert error.fix == f"{off} in place of {flag}"
    assert one_error(plan(cuda_graph_max_bs_prefill=3)).fix == "--cuda-graph-max-bs-prefill 8"
    switched_off = plan(**{f"cuda_graph_max_bs_{phase}": 0, f"{phase}_graphs": False})
    assert (switched_off.verdict, getattr(switched_off, f"cuda_graph_max_bs_{phase}")) == ("ok", 0)


def test_redundant_experts_that_leave_no_buffer_are_refused_for_themselves() -> None:
    """A million of them, mistyped: the model alone has a buffer."""
    for redundant in (1_000_000, 999_999):
        error = one_error(plan(tp_size=8, attn_dp_size=8, redundant_experts=redundant))
        assert error.limit == "communication buffer bytes per rank"
        assert f"256 experts and {redundant} redundant ones" in error.got
        assert error.changes == (("--ep-num-redundant-experts", "0"),)
    error = one_error(plan(replace(V3, num_experts=1_000_000)))
    assert ("--moe-a2a-backend", "none") in error.changes


def test_counts_that_arithmetic_cannot_start_from_are_the_users() -> None:
    """Mistyped: said so, and not divided by."""
    assert one_error(plan(tp_size=0)).fix == "--tp-size 1"
    assert one_error(plan(pp_size=0)).fix == "--pp-size 1"
    assert one_error(plan(redundant_experts=-8)).fix == "--ep-num-redundant-experts 0"
    assert one_error(plan(tp_size=8, moe_dp_size=2)).fix == "--moe-dp-size 1"


def test_a_decode_instance_prints_no_limit_for_its_prefills() -> None:
    """It runs none that T bounds: 65,536 is not 63,488 too many."""
    found = plan(
        *(V3,), tp_size=8, attn_dp_size=8, disaggregation_mode="decode", chunked_prefill_size=65536
    )
    assert found.verdict == "ok"
    chunk = next(budget for budget in found.budgets if budget.name == "chunked_prefill_size")
    assert (chunk.value, chunk.headroom, chunk.limit) == (65536, None, "none (a decode instance)")


def test_the_table_agrees_with_the_refusals_under_dynamic_chunking() -> None:
    """T = 256 carries a chunk of 204 per DP group: 1.25 times it is 255."""
    launch = {
        "tp_size": 8,
        "attn_dp_size": 8,
        "pp_size": 2,
        "dynamic_chunking": True,
        "max_prefill_tokens": 256,
        "max_tokens": 256,
    }
    chunk = next(b for b in plan(**launch).budgets if b.name == "chunked_prefill_size")
    assert (chunk.value, chunk.headroom) == (1600, 32)
    assert chunk.limit == "<= 1632 (T x attention TP x DP / 1.25)"
    assert plan(**launch, chunked_prefill_size=1632).verdict == "ok"
    error = one_error(plan(**launch, chunked_prefill_size=1640))
    assert error.got == (
        "--chunked-prefill-size 1640 // 8 DP groups x 1.25 (dynamic chunking) = 257 rows per rank"
    )
    assert error.fix == "--chunked-prefill-size 1632"


def test_not_batched_is_ok_and_empty() -> None:
    """Nothing to bound: no budgets, no errors."""
    found = plan(a2a_backend="none")
    assert (found.verdict, found.capability.ok, found.budgets) == ("ok", False, ())


def test_plans_travel_and_print() -> None:
    """Pickle to child processes, JSON to tools, a table to people."""
    found = plan(tp_size=8, attn_dp_size=8, max_tokens=100)
    assert pickle.loads(pickle.dumps(found)) == found
    parsed = json.loads(json.dumps(found.as_dict()))
    assert parsed["capability"]["use_batched_dp_moe"] is True
    assert parsed["errors"][0]["fix"] == "--batched-dp-moe-max-tokens 112"
    text = render(found)
    assert "2048" not in text.splitlines()[0]
    assert "verdict: refused" in text
    assert "refused: tokens per rank" in text


def test_refusal_raises_the_class_that_fits() -> None:
    """One kind: its class; several: ConfigError. All are caught as MoePluginError."""
    budget = Rejection("a", "b", "c", "d")
    config = Rejection("a", "b", "c", "d", kind="config")
    unsupported = Rejection("a", "b", "c", "d", kind="unsupported")
    assert type(refusal([budget])) is BudgetError
    assert type(refusal([unsupported])) is UnsupportedError
    mixed = refusal([budget, config, unsupported], Plan(capability=Capability(False, "")))
    assert type(mixed) is ConfigError
    assert mixed.rejections == (budget, config, unsupported)
    assert mixed.plan is not None


@pytest.mark.parametrize(
    ("model", "runner", "more", "own"),
    [
        (V3, "auto", {}, True),
        (V3, "deep_gemm", {}, False),  # typed beside what the host would choose: kept
        (QWEN, "deep_gemm", {}, True),  # typed because normal dispatch has no other
        (V3, "auto", {"deepep_mode": "low_latency"}, False),  # ours compute everything
        (V3, "auto", {"compute_capability": (10, 0)}, False),  # DeepGEMM's own weight layout
        (V3, "auto", {"waterfill": True}, False),
        (V3, "auto", {"transport": "torch"}, False),
    ],
)
def test_mode_auto_decodes_on_our_experts(
    model: ModelFacts, runner: str, more: dict[str, object], own: bool
) -> None:
    """Prefill's normal dispatch stays the host's."""
    given = {"deepep_mode": "auto", "has_deep_gemm": True, "compute_capability": (9, 0)}
    found = plan(model, moe_runner_backend=runner, runner_typed=True, **{**given, **more})
    assert found.own_decode == own
    assert found.fp8_rows == (model is V3)
    assert (found.experts == "host (prefill) and moe_plugin (decode)") == own


def test_fp4_experts_that_ours_repack_are_not_the_hosts_as_well() -> None:
    """Mode auto would have the host compute prefill from the same weights."""
    for capability in ((9, 0), (10, 0)):
        model, launch = replace(V3, weight_format="fp8_fp4"), {"deepep_mode": "auto"}
        assert not plan(model, compute_capability=capability, **launch).own_decode


def test_the_workspace_follows_the_rows_that_the_experts_take() -> None:
    """FP4 experts of an FP8 checkpoint take bf16 rows on ours."""
    sizes = {
        name: plan(replace(V3, weight_format=name)).workspace_bytes
        for name in ("fp8_block", "compressed-tensors_fp8", "fp8_fp4", "compressed-tensors_int4")
    }
    assert sizes["compressed-tensors_fp8"] == sizes["fp8_block"]
    assert sizes["compressed-tensors_int4"] == sizes["fp8_fp4"] > sizes["fp8_block"]
