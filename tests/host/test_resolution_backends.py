"""The host resolves launches on the other batched backends: budgets, variables and refusals."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from moe_plugin.backends import BUILT_IN

from ..support.resolving import Launch

TP8 = ("--tp-size", "8", "--attn-dp-size", "8")
TP8_DP2 = ("--tp-size", "8", "--attn-dp-size", "2")
OTHERS = ("nixl", "mooncake", "pplx", "deepep_v2")
VARIABLES = {name: BUILT_IN[name].limits.tokens_variable or "" for name in OTHERS}
NIXL_BF16 = "SGLANG_NIXL_EP_BF16_DISPATCH"


def on(backend: str) -> tuple[str, ...]:
    return "--moe-a2a-backend", backend, "--use-batched-dp-moe", "on"


@pytest.mark.parametrize("switch", ["on", "auto"])
@pytest.mark.parametrize("backend", OTHERS)
def test_every_budget_is_filled_from_t_and_t_goes_to_the_backends_variable(
    launch: Launch, backend: str, switch: str
) -> None:
    """The host's own checks of chunk and graphs pass with what we filled, on either switch."""
    flags = ("--moe-a2a-backend", backend, "--use-batched-dp-moe", switch)
    answer = launch(*TP8, *flags, model="qwen3-fp8")
    assert answer["ok"], answer["error"]
    tokens = answer["plan"]["max_dispatch_tokens_per_rank"]
    # More than the default only where the bytes that it costs are known.
    assert tokens == (256 if backend == "deepep_v2" else 512)
    assert answer["environment"][VARIABLES[backend]] == str(tokens)
    assert answer["resolved"]["moe_a2a_backend"] == backend
    assert answer["resolved"]["chunked_prefill_size"] == tokens  # of one DP group
    assert answer["resolved"]["max_running_requests"] == 8 * tokens
    assert 256 <= answer["decode"]["max_bs"] <= tokens
    assert answer["plan"]["transport"] == backend
    assert answer["plan"]["capability"]["modes"] == ["decode", "extend"]
    assert answer["plan"]["nvshmem_qp_depth"] == 0
    ours = "moe_plugin" if backend in ("nixl", "mooncake") else "host"
    assert answer["plan"]["runner"] == ours
    if backend != "deepep_v2":
        assert answer["resolved"]["deepep_mode"] == "low_latency"
    others = {*VARIABLES.values(), "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"}
    assert not (others - {VARIABLES[backend]}) & set(answer["environment"])


@pytest.mark.parametrize("backend", OTHERS)
def test_budgets_satisfy_the_host_over_attention_tp(launch: Launch, backend: str) -> None:
    """Two hosts' checks leave attention TP out: pplx for chunk and graph, DeepEP v2 for graphs."""
    tokens = ("--batched-dp-moe-max-tokens", "256")
    answer = launch(*TP8_DP2, *on(backend), *tokens, model="qwen3-fp8")
    assert answer["ok"], answer["error"]
    scattered = 256 * 4
    chunk = answer["resolved"]["chunked_prefill_size"]
    assert chunk == (256 if backend == "pplx" else scattered)
    running = answer["resolved"]["max_running_requests"] // 2
    assert running == (256 if backend == "pplx" else scattered)
    assert answer["decode"]["max_bs"] == (scattered if backend in ("nixl", "mooncake") else 256)


@pytest.mark.parametrize("backend", OTHERS)
def test_explicit_tokens_are_kept_or_refused_with_a_fix_that_works(
    launch: Launch, backend: str
) -> None:
    """By the backend's own variable: kept, too small for a typed chunk, contradicting the flag."""
    variable, flags = VARIABLES[backend], (*TP8, *on(backend))
    kept = launch(*flags, model="qwen3-fp8", env={variable: "64"})
    assert kept["plan"]["max_dispatch_tokens_per_rank"] == 64
    assert kept["resolved"]["chunked_prefill_size"] == 64
    typed = (*flags, "--chunked-prefill-size", "4096")
    over = launch(*typed, model="qwen3-fp8", env={variable: "128"})
    assert over["type"] == "BudgetError", over
    assert fixes(over) == [["--chunked-prefill-size", "1024"]]
    fixed = (*flags, "--chunked-prefill-size", "1024")
    assert launch(*fixed, model="qwen3-fp8", env={variable: "128"})["ok"]
    assert launch(*typed, model="qwen3-fp8")["environment"][variable] == "512"
    both = (*flags, "--batched-dp-moe-max-tokens", "64")
    assert [variable, None] in fixes(launch(*both, model="qwen3-fp8", env={variable: "128"}))


def fixes(answer: dict) -> list[list[str | None]]:
    """Every change that a refusal proposes."""
    assert not answer["ok"]
    return [change for error in answer["errors"] for change in error["changes"]]


@pytest.mark.parametrize("backend", ["nixl", "mooncake"])
def test_more_tokens_than_the_hosts_assert_are_refused(launch: Launch, backend: str) -> None:
    """1024: as the dispatchers assert, after the weights are in reach."""
    variable, flags = VARIABLES[backend], (*TP8, *on(backend))
    answer = launch(*flags, model="qwen3-fp8", env={variable: "2048"})
    assert fixes(answer) == [[variable, "1024"]]
    assert launch(*flags, model="qwen3-fp8", env={variable: "1024"})["ok"]


@pytest.mark.parametrize("backend", ["nixl", "mooncake", "pplx"])
def test_normal_mode_is_refused(launch: Launch, backend: str) -> None:
    """The host raises it while dispatchers are built, or at start."""
    answer = launch(*TP8, *on(backend), "--deepep-mode", "normal", model="qwen3-fp8")
    assert fixes(answer) == [["--deepep-mode", "low_latency"]]


def test_bf16_weights_over_nixl_get_bf16_rows(launch: Launch) -> None:
    """One variable decides for all layers: ours is exported, a contradicting one refused."""
    flags = (*TP8, *on("nixl"))
    answer = launch(*flags)
    assert answer["plan"]["runner"] == "moe_plugin"
    assert answer["environment"][NIXL_BF16] == "1"
    assert NIXL_BF16 not in launch(*flags, model="qwen3-fp8")["environment"]
    assert fixes(launch(*flags, env={NIXL_BF16: "0"})) == [[NIXL_BF16, None]]
    assert fixes(launch(*flags, model="qwen3-fp8", env={NIXL_BF16: "1"})) == [[NIXL_BF16, None]]
    forced = launch(*flags, "--moe-runner-backend", "deep_gemm")
    assert fixes(forced) == [["--moe-runner-backend", "auto"]]


def test_bf16_weights_over_mooncake_are_refused(launch: Launch) -> None:
    """It quantises every row; the way out is another backend."""
    answer = launch(*TP8, *on("mooncake"))
    assert fixes(answer) == [["--moe-a2a-backend", "deepep"], ["--deepep-mode", "low_latency"]]
    assert launch(*TP8, *on("deepep"))["ok"]


@pytest.mark.parametrize(
    ("backend", "flags", "model", "change"),
    [
        ("pplx", ("--tp-size", "8"), "qwen3", ["--attn-dp-size", "8"]),
        ("pplx", (*TP8, "--pp-size", "2"), "qwen3", ["--pp-size", "1"]),
        (
            "pplx",
            (*TP8, "--moe-runner-backend", "triton"),
            "qwen3",
            ["--moe-runner-backend", "auto"],
        ),
        ("deepep_v2", TP8, "qwen3-tensor", ["--moe-a2a-backend", "deepep"]),
        ("nixl", TP8, "qwen3-hidden", ["--moe-a2a-backend", "none"]),
    ],
)
def test_what_a_backend_cannot_run_is_refused(
    launch: Launch, backend: str, flags: Iterable[str], model: str, change: list[str]
) -> None:
    assert change in fixes(launch(*flags, *on(backend), model=model))


@pytest.mark.parametrize("model", ["qwen3", "qwen3-fp8"])
@pytest.mark.parametrize("backend", ["pplx", "deepep_v2"])
def test_what_the_stock_host_accepts_by_hand_is_accepted_unchanged(
    launch: Launch, backend: str, model: str
) -> None:
    """Values that fit the host's 128 tokens per rank, as its start-up checks ask for."""
    budgets = ("--chunked-prefill-size", "1024", "--cuda-graph-max-bs-decode", "128")
    answer = launch(*TP8, "--moe-a2a-backend", backend, *budgets, model=model)
    assert answer["ok"], answer["error"]
    assert answer["resolved"]["chunked_prefill_size"] == 128
    assert answer["decode"]["max_bs"] == 128


@pytest.mark.parametrize("backend", ["flashinfer", "megamoe", "mori", "ascend_fuseep"])
def test_on_says_why_another_backend_is_not_batched(launch: Launch, backend: str) -> None:
    answer = launch(*TP8, *on(backend))
    assert answer["type"] == "ConfigError"
    assert f"{backend}: " in answer["error"]
    assert fixes(answer) == [["--moe-a2a-backend", "deepep"]]


@pytest.mark.parametrize("backend", ["nixl", "mooncake"])
def test_a_missing_library_is_refused_before_the_weights(launch: Launch, backend: str) -> None:
    """The host finds out when it builds the first MoE layer."""
    module = BUILT_IN[backend].module
    answer = launch(*TP8, *on(backend), model="qwen3-fp8", without=module)
    assert f"{module} is not installed" in answer["error"]
    assert ["--moe-a2a-backend", "deepep"] in fixes(answer)


def test_pplx_captures_what_divides_over_attention_tp(launch: Launch) -> None:
    """It counts rows whole, but the host scatters them: a graph of one request is none."""
    flags = ("--tp-size", "4", "--attn-dp-size", "2", *on("pplx"))
    refused = launch(*flags, "--cuda-graph-max-bs-decode", "1", model="qwen3-fp8")
    assert fixes(refused) == [["--cuda-graph-max-bs-decode", "2"]], refused["error"]
    assert launch(*flags, "--cuda-graph-max-bs-decode", "2", model="qwen3-fp8")["ok"]
