"""Features of the real host that change what a rank dispatches, or who computes it."""

from __future__ import annotations

import pytest

from ..support.resolving import DEEPSEEK_V3, FP8_BLOCK, LL, QWEN3_30B, Launch, variant, write_models

DP2 = ("--tp-size", "2", "--attn-dp-size", "2")
ON = ("--use-batched-dp-moe", "on")
LEAVE = "--moe-a2a-backend none --use-batched-dp-moe off"
FP4 = {**FP8_BLOCK, "routed_experts_quant_method": "mxfp4"}
MORE = {
    "limited-bf16": variant(QWEN3_30B, swiglu_limit=7.0),
    "limited-fp8": variant(DEEPSEEK_V3, swiglu_limit=7.0),
    "no-dispatcher": variant(QWEN3_30B, architectures=["AfmoeForCausalLM"]),
    "fp4-experts": variant(DEEPSEEK_V3, quantization_config=FP4),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model directories, by name."""
    return write_models(tmp_path_factory.mktemp("models"), MORE)


BF16_ROWS = {"SGLANG_DEEPEP_BF16_DISPATCH": "1"}
ROWS_FLAG = "--deepep-dispatcher-output-dtype"
ROLES = (*("--disaggregation-mode", "prefill"), *("--disaggregation-transfer-backend", "mooncake"))
CACHE = ("--weight-cache-mode", "client", "--weight-cache-socket", "/tmp/cache.sock")
DEEP_GEMM = ("--moe-runner-backend", "deep_gemm")
DETERMINISTIC = ("--enable-deterministic-inference", "--attention-backend", "flashinfer")


@pytest.mark.parametrize(
    ("model", "flags", "env", "fix"),
    [
        ("qwen3-fp8", (*DP2, *LL, ROWS_FLAG, "bf16"), {}, f"remove {ROWS_FLAG}"),
        ("qwen3-fp8", (*DP2, *LL), BF16_ROWS, f"unset {next(iter(BF16_ROWS))}"),
        ("qwen3", (*DP2, *LL, ROWS_FLAG, "fp8"), {}, f"remove {ROWS_FLAG}"),
        ("limited-bf16", (*DP2, *LL, *DEEP_GEMM), {}, "--moe-runner-backend auto"),
        ("fp4-experts", (*DP2, *LL, *DEEP_GEMM), {}, "--moe-runner-backend auto"),
        ("fp4-experts", (*DP2, *LL, "--load-format", "sharded_state"), {}, LEAVE),
        ("fp4-experts", (*DP2, *LL, "--load-format", "presharded"), {}, "--load-format auto"),
        ("fp4-experts", (*DP2, *LL, *CACHE), {}, "--weight-cache-mode off"),
        ("qwen3", ("--tp-size", "2", *LL, "--model-impl", "transformers"), {}, LEAVE),
        ("qwen3", (*DP2, *ON, *ROLES, "--enable-pd-role-switch"), {}, "remove --enable-pd-role"),
        ("qwen3", ("--tp-size", "2", *ON, "--dwdp-size", "2"), {}, "remove --dwdp-size"),
        ("qwen3", (*DP2, *LL, *DETERMINISTIC), {}, "SGLANG_FLASHINFER_PREFILL_SPLIT_TILE_SIZE="),
        ("qwen3", (*DP2, *LL, "--enable-mis", "--attention-backend", "flashinfer"), {}, LEAVE),
    ],
)
def test_refused_before_anything_loads(
    launch: Launch,
    model: str,
    flags: tuple[str, ...],
    env: dict[str, str],
    fix: str,
) -> None:
    """Each would die after the weights, or answer wrongly: one error, and a fix that works."""
    answer = launch(*flags, model=model, env=env)
    assert not answer["ok"]
    assert len(answer["errors"]) == 1, answer
    assert fix in answer["errors"][0]["fix"], answer


@pytest.mark.parametrize("model", ["limited-fp8", "limited-bf16"])
def test_limited_experts_are_ours(launch: Launch, model: str) -> None:
    """Within our budgets."""
    plan = launch(*DP2, *LL, model=model)["plan"]
    assert plan["runner"] == "moe_plugin"
    assert plan["max_dispatch_tokens_per_rank"] >= 256
    assert plan["verdict"] == "ok"


def test_fp4_experts_are_told_from_the_checkpoints_fp8(launch: Launch) -> None:
    """Unless the host makes FP8 of them: then their rows are FP8 too."""
    as_they_are = launch(*DP2, *LL, model="fp4-experts")["plan"]
    dequantized = launch(*DP2, *LL, env={"SGLANG_DSV4_FP4_DEQUANT": "1"}, model="fp4-experts")[
        "plan"
    ]
    assert not as_they_are["fp8_rows"]
    assert dequantized["fp8_rows"]


def test_ray_actors_are_left_alone_unless_we_were_asked_for(launch: Launch) -> None:
    """They load no plugins: neither our experts nor T would reach them."""
    auto = launch(*DP2, *LL, "--use-ray")
    assert auto["ok"]
    assert auto["plan"] is None
    on = launch(*DP2, *ON, "--use-ray")
    assert on["type"] == "HostMismatchError"
    assert "--use-ray" in on["error"]


def test_models_that_reach_no_dispatcher_are_not_batched(launch: Launch) -> None:
    """The host accepts the backend and never uses it."""
    assert launch(*DP2, *LL, model="no-dispatcher")["plan"] is None


def test_rows_in_the_weights_own_dtype_change_nothing(launch: Launch) -> None:
    """Typed out, what `auto` selects."""
    same = launch(*DP2, *LL, ROWS_FLAG, "fp8", model="qwen3-fp8")["plan"]
    assert same == launch(*DP2, *LL, model="qwen3-fp8")["plan"]
    assert launch(*DP2, *LL, ROWS_FLAG, "bf16")["plan"]["verdict"] == "ok"


def test_rows_that_are_not_scattered_are_counted_whole(launch: Launch) -> None:
    """Without the padding to attention TP every rank may dispatch all of a group's rows."""
    flags = ("--tp-size", "2", *LL, "--batched-dp-moe-max-tokens", "256")
    assert launch(*flags)["resolved"]["chunked_prefill_size"] == 512
    whole = launch(*flags, "--disable-attn-tp-gather")
    assert whole["resolved"]["chunked_prefill_size"] == 256
    assert whole["resolved"]["max_running_requests"] == 256
    scattered = launch("--tp-size", "4", "--attn-dp-size", "2", *LL,
                    "--disable-attn-tp-gather")  # fmt: skip
    assert scattered["plan"]["attn_tp_size"] == 2


def test_a_named_graph_backend_wins_over_graphs_switched_off(launch: Launch) -> None:
    """As in the host; its sizes are filled then."""
    named = ("--cuda-graph-backend-prefill", "breakable", "--cuda-graph-backend-decode", "full")
    answer = launch(*DP2, *LL, "--disable-cuda-graph", *named)
    plan = answer["plan"]
    assert answer["prefill"]["max_bs"] == plan["cuda_graph_max_bs_prefill"] > 0
    assert answer["decode"]["max_bs"] == plan["cuda_graph_max_bs_decode"] > 0
    assert all(size % 8 == 0 for size in answer["prefill"]["bs"])
