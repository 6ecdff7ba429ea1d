"""The host's memory sizing keeps back our bytes instead of its flat guess, once, on both paths."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ..support.resolving import LL, Worker

H100_MIB = 81559
TP8 = ("--tp-size", "8", "--attn-dp-size", "8", *LL)
# What the plugin fills for T = 256, typed out, so that the stock host sizes the same launch.
SAME = ("--chunked-prefill-size", "2048", "--max-running-requests", "2048",
        "--cuda-graph-max-bs-decode", "256", "--cuda-graph-max-bs-prefill", "256")  # fmt: skip
AFTER_CAPTURE = {"SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "1"}


def both(
    worker: Worker, model: str, *flags: str, env: dict[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(stock, ours) for the same budgets."""
    argv = ["--model-path", model, *TP8, *SAME, *flags]
    stock, ours = worker.ask(
        [
            {"argv": [*argv, "--use-batched-dp-moe", "off"], "env": env or {}},
            {"argv": argv, "env": env or {}},
        ]
    )
    assert stock["ok"], stock["error"]
    assert ours["ok"], ours["error"]
    return stock, ours


def fraction(answer: dict[str, Any]) -> float:
    """What the launch keeps for weights and KV cache."""
    return float(answer["resolved"]["mem_fraction_static"])


def rounded(kept_mib: float) -> float:
    """Three digits, downwards: 80 MiB steps on this device."""
    return math.floor((1 - kept_mib / H100_MIB) * 1000) / 1000


@pytest.mark.parametrize("name", ["qwen3", "qwen3-fp8", "qwen3-235b"])
def test_flat_path_swaps_the_guess_for_our_bytes(
    worker: Worker, models: dict[str, str], name: str
) -> None:
    """2 GiB and 1 GiB out (not below the host's floor of 10 GiB), two workspaces in; the buffer
    exists before anything is measured and is not counted again."""
    stock, ours = both(worker, models[name])
    kept = H100_MIB * (1 - fraction(stock)) - 2048
    kept = max(min(kept, 10240), kept - 1024)
    workspace = ours["plan"]["workspace_bytes"]
    assert ours["plan"]["reserved_bytes"] == 2 * workspace
    assert fraction(ours) == pytest.approx(rounded(kept + 2 * workspace / 2**20), abs=0.0011)


def test_the_buffer_of_a_host_runner_is_not_reserved_either(
    worker: Worker, models: dict[str, str]
) -> None:
    """It is created while the model is built, whosever experts run: measured, not reserved."""
    _, ours = both(worker, models["qwen3"], "--moe-runner-backend", "deep_gemm")
    plan = ours["plan"]
    assert (plan["runner"], plan["reserved_bytes"]) == ("host", 2 * plan["workspace_bytes"])


def test_after_capture_only_the_eager_workspace_is_kept(
    worker: Worker, models: dict[str, str]
) -> None:
    """Buffer and graph pool are in what the host measures then; its guess is not on this path."""
    # One DP group, or the host compares the chunk before its division with the largest graph.
    one_group = ("--attn-dp-size", "1", "--cuda-graph-max-bs-prefill", "2048")
    stock, ours = both(worker, models["qwen3"], *one_group, env=AFTER_CAPTURE)
    assert fraction(stock) > 0.95  # the slack of that path, without the 10 GiB floor
    workspace = ours["plan"]["workspace_bytes"]
    assert ours["plan"]["reserved_bytes"] == workspace
    kept = H100_MIB * (1 - fraction(stock)) + workspace / 2**20
    assert fraction(ours) == pytest.approx(rounded(kept), abs=0.0011)


def test_an_explicit_fraction_is_the_users(worker: Worker, models: dict[str, str]) -> None:
    """Nothing is reserved behind it."""
    _, ours = both(worker, models["qwen3"], "--mem-fraction-static", "0.9")
    assert fraction(ours) == 0.9
    assert ours["plan"]["reserved_bytes"] == 0


def test_without_graphs_there_is_one_workspace(worker: Worker, models: dict[str, str]) -> None:
    """And the host made no guess that could be taken back."""
    graphs_off = ("--disable-decode-cuda-graph", "--disable-prefill-cuda-graph")
    stock, ours = both(worker, models["qwen3"], *graphs_off)
    workspace = ours["plan"]["workspace_bytes"]
    assert ours["plan"]["reserved_bytes"] == workspace
    kept = H100_MIB * (1 - fraction(stock)) + workspace / 2**20
    assert fraction(ours) == pytest.approx(rounded(kept), abs=0.0011)


def test_what_cannot_fit_is_refused_before_loading(worker: Worker, models: dict[str, str]) -> None:
    """With a capacity that fits: the buffer is no part of the reserve, but has to fit as well."""
    argv = ["--model-path", models["kimi-k2"], *TP8, "--disaggregation-mode", "decode"]
    argv += ["--moe-runner-backend", "deep_gemm", "--batched-dp-moe-max-tokens"]
    answer = worker.ask([{"argv": [*argv, "1024"]}])[0]
    assert answer["errors"][0]["limit"] == "device memory"
    flag, value = answer["errors"][0]["changes"][0]
    assert flag == argv[-1]
    assert worker.ask([{"argv": [*argv, value]}])[0]["ok"]


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_graphs_of_either_kind_need_a_second_workspace(
    worker: Worker, models: dict[str, str], kind: str
) -> None:
    """Decode and prefill graphs capture into one pool."""
    _, ours = both(worker, models["qwen3"], f"--disable-{kind}-cuda-graph")
    assert ours["plan"]["reserved_bytes"] == 2 * ours["plan"]["workspace_bytes"]
