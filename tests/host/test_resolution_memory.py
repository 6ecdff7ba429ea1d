"""The host's memory sizing keeps back our bytes instead of its flat guess, and what the plan says
of the host's own sizing is what the host does."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moe_plugin.integration.resolve.memory_facts import brings_kv_scales
from moe_plugin.planning.memory_record import CONTEXT_BYTES, MIB

from ..support.resolving import LL, Worker

H100_MIB = 81559
USABLE = H100_MIB * MIB - CONTEXT_BYTES
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


@pytest.mark.parametrize("name", ["qwen3", "qwen3-fp8", "qwen3-235b", "deepseek-v3"])
def test_flat_path_swaps_the_guess_for_our_bytes(
    worker: Worker, models: dict[str, str], name: str
) -> None:
    """2 GiB and 1 GiB out (not below the host's floor of 10 GiB), buffer and two workspaces in."""
    argv = ["--model-path", models[name], *TP8]
    stock, ours = worker.ask(
        [
            {"argv": [*argv, *SAME, "--use-batched-dp-moe", "off"]},
            {"argv": [*argv, "--batched-dp-moe-max-tokens", "256"]},
        ]
    )
    assert ours["ok"], ours["error"]
    kept = H100_MIB * (1 - fraction(stock)) - 2048
    kept = max(min(kept, 10240), kept - 1024)
    plan = ours["plan"]
    assert plan["reserved_bytes"] == plan["rdma_device_bytes"] + 2 * plan["workspace_bytes"]
    expected = 1 - (kept * MIB + plan["reserved_bytes"]) / USABLE
    assert fraction(ours) == pytest.approx(math.floor(expected * 1000) / 1000, abs=0.0011)
    assert plan["memory"]["mem_fraction_static"] == fraction(ours)


LAUNCHES = {
    "plain": TP8,
    "one group": ("--tp-size", "2", *LL),
    "typed": (*TP8, "--chunked-prefill-size", "1024", "--cuda-graph-max-bs-decode", "64"),
    "decode": (*TP8, "--disaggregation-mode", "decode", "--moe-runner-backend", "deep_gemm"),
    "prefill": (*TP8, "--disaggregation-mode", "prefill"),
    "no graphs": (*TP8, "--disable-decode-cuda-graph", "--disable-prefill-cuda-graph"),
    "two nodes": ("--tp-size", "16", "--attn-dp-size", "4", *LL, "--nnodes", "2",
                  "--node-rank", "1", "--dist-init-addr", "127.0.0.1:5000"),
}  # fmt: skip


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("name", ["qwen3", "deepseek-v3"])
def test_the_plan_knows_the_hosts_own_sizing(
    worker: Worker, models: dict[str, str], name: str, launch: str
) -> None:
    """For the flags as typed, and for them with what the plan filled."""
    argv = ["--model-path", models[name], *LAUNCHES[launch]]
    off = ("--use-batched-dp-moe", "off")
    stock, ours = worker.ask([{"argv": [*argv, *off]}, {"argv": argv}])
    assert ours["ok"], ours["error"]
    plan, memory = ours["plan"], ours["plan"]["memory"]
    assert memory["stock_fraction"] == pytest.approx(fraction(stock), abs=0.0011)
    filled = [
        item
        for flag, value in (
            ("--chunked-prefill-size", plan["chunked_prefill_size"]),
            ("--max-running-requests", plan["max_running_requests"]),
            ("--cuda-graph-max-bs-decode", plan["cuda_graph_max_bs_decode"]),
            ("--cuda-graph-max-bs-prefill", plan["cuda_graph_max_bs_prefill"]),
        )
        if value and flag not in argv
        for item in (flag, str(value))
    ]
    (same,) = worker.ask([{"argv": [*argv, *filled, *off]}])
    assert memory["host_fraction"] == pytest.approx(fraction(same), abs=0.0011)
    assert fraction(ours) >= min(fraction(stock), memory["mem_fraction_static"])


@pytest.mark.parametrize(
    "flags", [("--dcp-size", "2"), ("--attn-cp-size", "2", "--attn-dp-size", "4")]
)
def test_graphs_that_the_host_leaves_out_take_nothing_from_the_kv_cache(
    worker: Worker, models: dict[str, str], flags: tuple[str, ...]
) -> None:
    """It captures none for prefills with context parallelism, whatever the plan counted."""
    argv = ["--model-path", models["deepseek-v3"], "--tp-size", "8", *LL, *flags]
    stock, ours = worker.ask([
        {"argv": [*argv, "--use-batched-dp-moe", "off"]},
        {"argv": argv},
    ])  # fmt: skip
    assert ours["ok"], ours["error"]
    assert fraction(ours) >= fraction(stock) - 0.0011


@pytest.mark.parametrize(
    ("config", "scaled"),
    [
        ({"quant_method": "fp8", "kv_cache_quant_algo": "FP8"}, True),
        ({"quant_method": "fp8", "kv_cache_scheme": {"type": "float", "num_bits": 8}}, False),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"type": "float", "num_bits": 8}}, True),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {
            "type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}}, True),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": {
            "type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}}, False),
        ({"quant_method": "compressed-tensors", "kv_cache_scheme": None}, False),
        ({}, False),
    ],
)  # fmt: skip
def test_scales_of_the_kv_cache_are_read_as_the_host_reads_them(
    config: dict[str, Any], scaled: bool
) -> None:
    assert brings_kv_scales(config) is scaled


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
    assert fraction(ours) == pytest.approx(fraction(stock) - workspace / USABLE, abs=0.0011)


def test_batches_past_the_largest_graph_have_a_workspace_after_capture(
    worker: Worker, models: dict[str, str]
) -> None:
    """Where prefill goes another way, decode batches are what runs eagerly, if any does."""
    auto = ("--moe-a2a-backend", "deepep", "--deepep-mode", "auto", "--attn-dp-size", "1")
    sizes = ("--cuda-graph-max-bs-decode", "64", "--cuda-graph-max-bs-prefill", "2048")
    for running, eager in (("64", False), ("128", True)):
        more = (*auto, *sizes, "--max-running-requests", running)
        _, ours = both(worker, models["qwen3-fp8"], *more, env=AFTER_CAPTURE)
        plan = ours["plan"]
        assert plan["reserved_bytes"] == (plan["workspace_bytes"] if eager else 0)


@pytest.mark.parametrize(
    ("typed", "way"),
    [
        (("--cuda-graph-bs-decode", "1", "1024"), "--cuda-graph-bs-decode 1 "),
        (("--cuda-graph-config", '{"decode": {"bs": [1, 1024]}}'), '\'{"decode": {"bs": [1, '),
    ],
)
def test_every_way_out_that_is_named_works(
    worker: Worker, models: dict[str, str], typed: tuple[str, ...], way: str
) -> None:
    """Also behind an `or`: spelled as the user did, and resolved before it is printed."""
    argv = ["--model-path", models["qwen3"], *TP8, "--use-batched-dp-moe", "on"]
    argv += ["--mem-fraction-static", "0.9"]
    (refused,) = worker.ask([{"argv": [*argv, *typed]}])
    (error,) = refused["errors"]
    ways = [error["changes"], *error["alternatives"]]
    assert len(error["fix"].split(", or ")) == len(ways) > 1
    assert way in error["fix"]
    for changes in ways:
        flags = dict(zip(argv[::2], argv[1::2], strict=True)) | {typed[0]: " ".join(typed[1:])}
        for flag, value in changes:
            flags[flag] = value
        again = [
            word
            for flag, value in flags.items()
            for word in (flag, *([value] if flag == "--cuda-graph-config" else value.split()))
        ]
        (answer,) = worker.ask([{"argv": again}])
        assert answer["ok"], answer["error"]


def test_an_explicit_fraction_is_the_users(worker: Worker, models: dict[str, str]) -> None:
    """Nothing is reserved behind it, and the KV cache is what it says: the buffer is created out
    of the rest."""
    _, ours = both(worker, models["qwen3"], "--mem-fraction-static", "0.85")
    assert fraction(ours) == 0.85
    assert ours["plan"]["reserved_bytes"] == 0
    memory = ours["plan"]["memory"]
    assert memory["weights_bytes"] + memory["kv_cache_bytes"] == int(USABLE * 0.85)


def test_without_graphs_there_is_one_workspace(worker: Worker, models: dict[str, str]) -> None:
    """And the host made no guess that could be taken back."""
    graphs_off = ("--disable-decode-cuda-graph", "--disable-prefill-cuda-graph")
    _, ours = both(worker, models["qwen3"], *graphs_off)
    plan = ours["plan"]
    assert plan["reserved_bytes"] == plan["rdma_device_bytes"] + plan["workspace_bytes"]


def test_what_cannot_fit_is_refused_before_loading(worker: Worker, models: dict[str, str]) -> None:
    """With a capacity that fits."""
    argv = ["--model-path", models["kimi-k2"], *TP8, "--disaggregation-mode", "decode"]
    argv += ["--moe-runner-backend", "deep_gemm", "--mem-fraction-static", "0.8"]
    argv += ["--batched-dp-moe-max-tokens"]
    answer = worker.ask([{"argv": [*argv, "1024"]}])[0]
    assert answer["errors"][0]["limit"] == "device memory"
    assert "--mem-fraction-static 0." in answer["errors"][0]["fix"]
    assert "--batched-dp-moe-max-tokens 128" in answer["errors"][0]["fix"]
    flag, value = answer["errors"][0]["changes"][0]
    fixed = [*argv[:-3], flag, value, argv[-1], "1024"]
    assert worker.ask([{"argv": fixed}])[0]["ok"]
    assert worker.ask([{"argv": [*argv, "128"]}])[0]["ok"]


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_graphs_of_either_kind_need_a_second_workspace(
    worker: Worker, models: dict[str, str], kind: str
) -> None:
    """Decode and prefill graphs capture into one pool."""
    _, ours = both(worker, models["qwen3"], f"--disable-{kind}-cuda-graph")
    plan = ours["plan"]
    assert plan["reserved_bytes"] == plan["rdma_device_bytes"] + 2 * plan["workspace_bytes"]


KV = ("--kv-cache-dtype", "fp8_e4m3")
ROOM = (*TP8, "--mem-fraction-static", "0.6")


@pytest.mark.parametrize(
    ("model", "flags", "token"),
    [
        ("deepseek-v3", ROOM, 4 * 576 * 2),
        ("deepseek-v3", (*ROOM, *KV), 4 * 576),
        # Values and scales in FP8, the positional part in bf16; and the indexer's keys.
        ("glm5", (*ROOM, *KV), 4 * (512 + 4 * 4 + 2 * 64 + 132)),
        ("glm5", ROOM, 4 * (576 * 2 + 132)),
        # Scales of a checkpoint are for an FP8 cache.
        ("qwen3-kv", ROOM, 4 * 4 * 2 * 128),
        ("qwen3-fp8", ROOM, 4 * 4 * 2 * 128 * 2),
    ],
)
def test_a_token_is_what_the_host_makes_of_it(
    worker: Worker, models: dict[str, str], model: str, flags: tuple[str, ...], token: int
) -> None:
    """Models and checkpoints decide about the KV cache after memory is sized."""
    answer = worker.ask([{"argv": ["--model-path", models[model], *flags], "built": True}])[0]
    assert answer["ok"], answer["error"]
    memory = answer["plan"]["memory"]
    assert memory["kv_token_bytes"] == token == answer["built"]["kv_token"]
    assert memory["kv_cache_tokens"] == memory["kv_cache_bytes"] // token


@pytest.mark.parametrize("flag", ["--enable-two-batch-overlap", "--pp-size 2"])
def test_prefill_graphs_that_the_host_leaves_out_are_not_kept_for(
    worker: Worker, models: dict[str, str], flag: str
) -> None:
    """It captures none in pipelines and under two-batch overlap, unless they were named."""
    argv = ["--model-path", models["qwen3"], *TP8, *flag.split()]
    stock, ours = worker.ask([{"argv": [*argv, "--use-batched-dp-moe", "off"]}, {"argv": argv}])
    assert ours["ok"], ours["error"]
    assert ours["prefill"]["backend"] == "disabled"
    assert ours["plan"]["cuda_graph_max_bs_prefill"] == 0
    memory = ours["plan"]["memory"]
    assert memory["stock_fraction"] == pytest.approx(fraction(stock), abs=0.0011)
