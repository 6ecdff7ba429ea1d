"""Plans within device memory: what is kept back, what shrinks, when T grows, and refusals."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from moe_plugin.backends.deepep import DEEPEP_LIMITS
from moe_plugin.planning.facts import LaunchFacts, ModelFacts
from moe_plugin.planning.memory_record import MIB, MemoryFacts
from moe_plugin.planning.memory_use import USEFUL_SHARE
from moe_plugin.planning.plan import Plan
from moe_plugin.planning.planner import make_plan
from moe_plugin.planning.report import render
from moe_plugin.planning.weight_bytes import Topology, from_shape

from .test_weights import FP8, QWEN_30B, QWEN_235B, V3, shape

H100, H200 = 81559 * MIB, 143771 * MIB
V3_FP8 = ModelFacts(
    architecture="DeepseekV3ForCausalLM",
    hidden_size=7168,
    num_experts=256,
    top_k=8,
    moe_intermediate_size=2048,
    context_length=163840,
    weight_format="fp8_block",
    weights=from_shape(shape(V3, FP8)),
)
QWEN_30B_BF16 = ModelFacts(
    architecture="Qwen3MoeForCausalLM",
    hidden_size=2048,
    num_experts=128,
    top_k=8,
    moe_intermediate_size=768,
    context_length=40960,
    weights=from_shape(shape(QWEN_30B)),
)
QWEN_235B_FP8 = replace(
    QWEN_30B_BF16,
    hidden_size=4096,
    moe_intermediate_size=1536,
    weight_format="fp8_block",
    weights=from_shape(shape(QWEN_235B, FP8)),
)


def plan(model: ModelFacts, ranks: int, device: int = H100, /, **launch: Any) -> Plan:
    """A plan with attention DP on every rank, on a device of so many bytes."""
    facts = {name: launch.pop(name) for name in list(launch) if name in MemoryFacts.__slots__}
    mla = model is V3_FP8
    memory = MemoryFacts(device_bytes=device, mla=mla, **facts)
    launch = {"tp_size": ranks, "attn_dp_size": ranks, **launch}
    return make_plan(model, LaunchFacts(memory=memory, **launch), DEEPEP_LIMITS)


def parts(found: Plan) -> int:
    """Weights, KV cache and everything that is kept back, as one sum."""
    memory = found.memory
    assert memory is not None
    beside = memory.buffer_bytes + memory.workspace_bytes + memory.graphs_bytes
    return memory.weights_bytes + memory.kv_cache_bytes + beside + memory.activations_bytes


@pytest.mark.parametrize("ranks", [16, 32, 64])
def test_what_is_ours_to_size_shrinks_until_it_fits(ranks: int) -> None:
    """DeepSeek-V3 on H100s: graphs first, then T; and the sum is within the device."""
    found = plan(V3_FP8, ranks, moe_dense_tp_size=ranks)
    memory = found.memory
    assert found.verdict == "ok"
    assert memory is not None
    assert memory.kv_cache_bytes >= H100 // USEFUL_SHARE
    assert memory.kv_cache_tokens == memory.kv_cache_bytes // (61 * 576 * 2)
    assert parts(found) <= memory.usable_bytes
    assert found.cuda_graph_max_bs_decode < 256
    assert found.max_dispatch_tokens_per_rank >= 128


def test_a_smaller_t_says_what_it_makes_room_for() -> None:
    """In the ledger, where people look for the reason."""
    found = plan(V3_FP8, 16, moe_dense_tp_size=16)
    assert found.max_dispatch_tokens_per_rank == 128
    assert found.budgets[0].source == "derived"
    assert "256 leave too little beside 55.09 GiB of weights" in found.budgets[0].arithmetic
    assert "KV cache" in render(found)


@pytest.mark.parametrize(("model", "ranks"), [(QWEN_235B_FP8, 16), (QWEN_30B_BF16, 4)])
def test_groups_apart_that_fit_win_over_joined_ones_that_do_not(
    model: ModelFacts, ranks: int
) -> None:
    """Though the refused plan has the larger T: it is none that runs."""
    fraction = {16: 0.9, 4: 0.92}[ranks]
    assert plan(model, ranks, fraction=fraction, moe_dense_tp_size=ranks).verdict == "refused"
    found = plan(model, ranks, fraction=fraction)
    assert found.verdict == "ok"
    assert found.groups_apart


def test_weights_that_do_not_fit_are_refused_with_ranks_that_hold_them() -> None:
    """93 GiB on 80: no T helps, twice the ranks do, as the plan for those says too."""
    found = plan(V3_FP8, 8)
    (error,) = found.errors
    assert error.limit == "device memory"
    assert "95.82 GiB of weights" in error.got
    assert error.fix == "--tp-size 16 --attn-dp-size 16"
    assert plan(V3_FP8, 16).verdict == "ok"
    assert error.changes == (("--tp-size", "16"), ("--attn-dp-size", "16"))


def test_typed_values_are_kept_and_every_knob_is_named() -> None:
    """T and graphs as typed leave nothing for the KV cache; each fix is planned before."""
    typed = {"max_tokens": 1024, "cuda_graph_max_bs_decode": 512}
    found = plan(V3_FP8, 32, **typed)
    (error,) = found.errors
    assert found.max_dispatch_tokens_per_rank == 1024
    assert "--batched-dp-moe-max-tokens" in error.fix
    (flag, value), *_ = error.changes
    assert flag == "--batched-dp-moe-max-tokens"
    assert plan(V3_FP8, 32, **{**typed, "max_tokens": int(value or 0)}).verdict == "ok"


def test_a_typed_fraction_keeps_its_kv_cache() -> None:
    """usable x fraction = weights + KV cache, whatever T is; the buffer comes out of the rest."""
    found = plan(V3_FP8, 16, H200, fraction=0.8)
    memory = found.memory
    assert memory is not None
    assert found.verdict == "ok"
    kept = memory.usable_bytes - memory.weights_bytes - memory.kv_cache_bytes
    assert kept == pytest.approx(0.2 * memory.usable_bytes, abs=2)
    assert memory.mem_fraction_static == 0.8
    held = (memory.buffer_bytes, memory.workspace_bytes, memory.graphs_bytes)
    assert sum(held) + memory.activations_bytes <= kept


def test_a_fraction_that_leaves_too_little_gets_a_smaller_t_or_one_that_works() -> None:
    """0.95 of an H200 leaves 7 GiB: not even T = 64 fits. The fraction that is named does."""
    found = plan(V3_FP8, 16, H200, fraction=0.95)
    (error,) = found.errors
    (flag, value), *_ = error.changes
    assert flag == "--mem-fraction-static"
    assert plan(V3_FP8, 16, H200, fraction=float(value or 0)).verdict == "ok"
    assert plan(V3_FP8, 16, H200, fraction=0.5).verdict == "ok"
    small = plan(V3_FP8, 16, H200, fraction=0.39)
    assert "55.09 GiB of weights" in small.errors[0].got  # dense layers and head are shared


@pytest.mark.parametrize(
    ("launch", "tokens"),
    [
        ({"max_running_requests": 1024}, 128),
        ({"max_running_requests": 64}, 64),
        ({"max_running_requests": 4096}, 512),
        ({}, 256),
        ({"max_running_requests": 64, "max_tokens": 256}, 256),
        ({"max_running_requests": 64, "host_tokens_per_rank": 512}, 512),
    ],
)
@pytest.mark.parametrize(
    "role", [{"disaggregation_mode": "decode"}, {"deepep_mode": "auto", "has_deep_gemm": True}]
)
def test_decode_rows_alone_need_as_many_as_run(
    launch: dict[str, Any], tokens: int, role: dict[str, Any]
) -> None:
    """On a decode instance and in mode auto: what is typed, at least 64; the user's T wins."""
    launch = {**launch, **role, "moe_runner_backend": "deep_gemm"}
    found = plan(V3_FP8, 8, H200, **launch)
    assert found.max_dispatch_tokens_per_rank == tokens


def test_t_grows_where_it_costs_a_tenth_of_the_kv_cache_at_most() -> None:
    """Qwen3-30B on 4 H200: to 1024. Qwen3-235B on 8 H100: 512 would cost more than that."""
    grown = plan(QWEN_30B_BF16, 4, H200)
    assert grown.max_dispatch_tokens_per_rank == 1024
    assert "at most a tenth" in grown.budgets[0].arithmetic
    assert dict(grown.prompt_steps) == {1024: 1, 8192: 8, 32768: 32}
    fixed = plan(QWEN_30B_BF16, 4, H200, max_tokens=256)
    assert grown.memory is not None
    assert fixed.memory is not None
    lost = fixed.memory.kv_cache_bytes - grown.memory.kv_cache_bytes
    assert 0 < lost <= fixed.memory.kv_cache_bytes / 10
    assert grown.cuda_graph_max_bs_decode == fixed.cuda_graph_max_bs_decode == 256
    assert plan(QWEN_235B_FP8, 8).max_dispatch_tokens_per_rank == 256
    chunk = plan(QWEN_30B_BF16, 4, H200, chunked_prefill_size=512)
    assert chunk.max_dispatch_tokens_per_rank == 256  # a larger T would buy nothing


@pytest.mark.parametrize("unknown", [{"memory": None}, {"weights": None}])
def test_t_stays_where_memory_is_not_known(unknown: dict[str, Any]) -> None:
    """On a CPU, or for a model whose weights nobody can count."""
    model = QWEN_30B_BF16
    memory = MemoryFacts(device_bytes=H200)
    launch = LaunchFacts(tp_size=4, attn_dp_size=4, memory=memory)
    if "weights" in unknown:
        model = replace(model, **unknown)
    else:
        launch = replace(launch, **unknown)
    assert make_plan(model, launch, DEEPEP_LIMITS).max_dispatch_tokens_per_rank == 256


def test_a_plan_asked_again_answers_the_same() -> None:
    """Late in resolution T and graphs are given, not chosen anew."""
    early = plan(V3_FP8, 16)
    launch = LaunchFacts(
        tp_size=16,
        attn_dp_size=16,
        default_tokens=early.max_dispatch_tokens_per_rank,
        decode_graph_cap=early.cuda_graph_max_bs_decode,
    )
    late = make_plan(V3_FP8, launch, DEEPEP_LIMITS)
    for name in ("max_dispatch_tokens_per_rank", "cuda_graph_max_bs_decode", "rdma_device_bytes"):
        assert getattr(late, name) == getattr(early, name)


def test_the_kv_cache_is_never_smaller_than_the_stock_hosts() -> None:
    """Its own reserve for the same flags may be below the host's rule plus our bytes: then what
    really runs decides."""
    typed = {
        "chunked_prefill_size": 1024,
        "cuda_graph_max_bs_decode": 64,
        "max_running_requests": 512,
    }
    found = plan(V3_FP8, 8, H200, **typed)
    memory = found.memory
    assert memory is not None
    assert found.max_dispatch_tokens_per_rank == 128  # as the stock host's own
    assert memory.mem_fraction_static >= memory.stock_fraction
    rule = plan(V3_FP8, 8, H200)
    assert rule.memory is not None
    assert rule.memory.mem_fraction_static > rule.memory.stock_fraction


def test_topology_of_a_launch() -> None:
    """The names of the host's flags, as parts of weights."""
    whole = plan(V3_FP8, 16, whole_dense=True, whole_head=True).memory
    assert whole is not None
    divided = Topology(ranks=16, whole_embedding=True, whole_dense=True, whole_head=True)
    assert whole.weights_bytes == V3_FP8.weights.per_rank(divided)  # type: ignore[union-attr]
    assert SimpleNamespace(**plan(V3_FP8, 16).as_dict()["memory"]).device_bytes == H100


def test_a_cap_on_tokens_leaves_the_rest_to_the_buffer() -> None:
    """``--max-total-tokens`` bounds the KV cache whatever the fraction: what it does not take is
    there for the buffer, and T grows as it would without it."""
    refused = plan(QWEN_30B_BF16, 4, fraction=0.95)
    found = plan(QWEN_30B_BF16, 4, fraction=0.95, kv_token_cap=65536)
    assert [error.limit for error in refused.errors] == ["device memory"]
    assert found.verdict == "ok"
    assert found.memory is not None
    assert found.memory.kv_cache_tokens == 65536
    assert found.max_dispatch_tokens_per_rank == 1024
    assert parts(found) <= found.memory.usable_bytes


def test_what_each_dp_group_holds_whole_is_counted() -> None:
    """The LM head that is filled to be a group's own is there once per rank."""
    memory = plan(QWEN_30B_BF16, 4).memory
    typed = plan(QWEN_30B_BF16, 4, whole_dense=True, whole_head=True).memory
    joined = plan(QWEN_30B_BF16, 4, moe_dense_tp_size=4).memory
    assert memory is not None
    assert typed is not None
    assert joined is not None
    assert memory.weights_bytes == typed.weights_bytes > joined.weights_bytes


def test_dp_groups_are_joined_where_what_each_holds_whole_costs_tokens() -> None:
    """Own dense layers and heads save what joining the rows takes, here more than they cost; where
    they cost T the flags are not filled."""
    apart, joined = plan(V3_FP8, 16), plan(V3_FP8, 16, moe_dense_tp_size=16)
    assert apart.groups_apart
    assert not joined.groups_apart
    assert apart.max_dispatch_tokens_per_rank > joined.max_dispatch_tokens_per_rank
    assert parts(apart) <= H100
    tight = plan(V3_FP8, 16, 76 * 1024 * MIB)
    whole = plan(V3_FP8, 16, 76 * 1024 * MIB, moe_dense_tp_size=1, dp_lm_head=True)
    assert tight.verdict == "ok"
    assert tight.max_dispatch_tokens_per_rank >= whole.max_dispatch_tokens_per_rank


def test_decoding_requests_ride_along_where_it_was_seen_to_pay() -> None:
    """T, its reason and the graphs stay; running requests leave half a chunk. Not with latent
    attention, a small T, a typed chunk, speculation, or where the launch speaks against it."""
    alone, mixed = plan(QWEN_30B_BF16, 4), plan(QWEN_30B_BF16, 4, may_mix_chunks=True)
    assert not alone.mixed_chunk
    assert mixed.mixed_chunk
    assert mixed.budgets[0] == alone.budgets[0]
    assert mixed.max_dispatch_tokens_per_rank == 1024
    assert mixed.cuda_graph_max_bs_decode == alone.cuda_graph_max_bs_decode == 256
    assert mixed.max_running_requests == 4 * 512
    for against in (
        {"max_tokens": 256},
        {"chunked_prefill_size": 4096},
        {"draft_width": 2},
        {"prefill_graphs": False},
        {"disaggregation_mode": "decode"},
        {"moe_dense_tp_size": 4},
        {"two_batch_overlap": True},
        {"pp_size": 2},
        {"resolved": True},
    ):
        assert not plan(QWEN_30B_BF16, 4, may_mix_chunks=True, **against).mixed_chunk, against
    assert not plan(V3_FP8, 32, H200, may_mix_chunks=True).mixed_chunk


def test_nothing_is_filled_into_a_resolved_launch() -> None:
    """Where memory kept the groups joined, the plan of the resolved launch says so too."""
    early = plan(V3_FP8, 16, 76 * 1024 * MIB)
    late = {"default_tokens": early.max_dispatch_tokens_per_rank, "resolved": True}
    assert not early.groups_apart
    assert not plan(V3_FP8, 16, 76 * 1024 * MIB, **late).groups_apart
    assert plan(V3_FP8, 16, H200).groups_apart
    assert not plan(V3_FP8, 16, H200, symmetric_memory=True).groups_apart
    typed = {"moe_dense_tp_size": 1, "dp_lm_head": True}
    assert plan(V3_FP8, 16, H200, **late, **typed).groups_apart


def test_groups_prefill_beside_decode_where_prompts_are_prefilled() -> None:
    typed = {"moe_dense_tp_size": 1, "dp_lm_head": True}
    for role, prefills in (("null", True), ("prefill", True), ("decode", False)):
        found = plan(V3_FP8, 16, H200, disaggregation_mode=role, **typed)
        assert found.groups_apart
        assert found.prefills_beside_decode == prefills, role
    assert not plan(V3_FP8, 16, H200, symmetric_memory=True).prefills_beside_decode


def test_what_groups_hold_whole_takes_nothing_of_a_typed_fraction() -> None:
    """Their dense layers and head would come out of the KV cache that the user asked for; where
    --max-total-tokens asks for less than there is, they come out of the rest."""
    typed = plan(V3_FP8, 16, H200, fraction=0.8)
    assert typed.memory is not None
    assert not typed.groups_apart
    assert typed.memory.kv_cache_bytes == typed.memory.stock_kv_bytes
    capped = plan(V3_FP8, 16, H200, fraction=0.8, kv_token_cap=100_000)
    assert capped.groups_apart
    asked = plan(V3_FP8, 16, H200, fraction=0.8, moe_dense_tp_size=1, dp_lm_head=True)
    assert asked.groups_apart


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_kv_cache_is_as_large_as_the_stock_hosts(ranks: int) -> None:
    """Also beside what groups hold whole, and at the larger T that memory allows."""
    found = plan(QWEN_30B_BF16, ranks, H200)
    assert found.memory is not None
    assert found.groups_apart
    assert not found.memory.less_than_stock
    joined = plan(QWEN_30B_BF16, ranks, H100, attn_dp_size=1)
    assert joined.memory is not None
    assert not joined.memory.less_than_stock


def test_a_backend_that_the_host_selects_late_has_no_guess_of_the_hosts() -> None:
    """Waterfill: the host sizes memory before it turns to DeepEP."""
    late = plan(V3_FP8, 16, H200, backend_late=True)
    known = plan(V3_FP8, 16, H200)
    assert late.memory is not None
    assert known.memory is not None
    assert late.memory.stock_fraction > known.memory.stock_fraction
    assert not late.memory.less_than_stock


@pytest.mark.parametrize("flag", ["waterfill", "fuses_experts"])
def test_fused_shared_experts_add_one_per_rank_to_the_buffer(flag: str) -> None:
    """272 experts on 16 ranks; models without fused shared experts have theirs alone."""
    fused_flag = {flag: True, "deepep_mode": "auto", "max_tokens": 128}
    fused = plan(replace(V3_FP8, fuses_shared=True), 16, H200, **fused_flag)
    apart = plan(V3_FP8, 16, H200, **fused_flag)
    assert (fused.num_experts, apart.num_experts) == (272, 256)
    size = DEEPEP_LIMITS.buffer_bytes
    assert size is not None
    assert fused.rdma_buffer_bytes == size(128, 7168, 16, 272)
    assert fused.verdict == "ok"


def test_a_cap_on_running_requests_takes_nothing_of_the_kv_cache() -> None:
    """A T that carries it would; as the host's KV cache undercuts the cap, so does a smaller T.
    ``on`` keeps what was typed."""
    cap = {"max_running_requests": 14000, "attn_dp_size": 4}
    auto = plan(V3_FP8, 16, H200, required=False, **cap)
    asked = plan(V3_FP8, 16, H200, **cap)
    assert auto.memory is not None
    assert not auto.memory.less_than_stock
    assert auto.max_dispatch_tokens_per_rank == 128
    assert "is lowered to" in auto.notes[0]
    assert asked.max_dispatch_tokens_per_rank >= 14000 // 4 // 4
    assert asked.max_running_requests == 14000
