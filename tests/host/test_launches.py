"""Launches that die late on the stock host: accepted before; refused with a fix, or planned, now.

One case per launch that fails on SGLang 0.5.23, on H100s of 80 GB. *Before* is the stock
resolution for that device; it accepts them all. The crashes themselves need a GPU: stage ``stock``
of the serving benchmark shows those that one GPU can, the others were read in the host's code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from ..support.resolving import Worker, quantized, write_models

TP8 = ("--tp-size", "8", "--attn-dp-size", "8", "--moe-a2a-backend", "deepep")
LL = (*TP8, "--deepep-mode", "low_latency")
CAPACITY = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
EAGLE = (
    *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4"),
)


@dataclass(frozen=True)
class Row:
    """One row: a launch, and what becomes of it.

    Attributes:
        number: its name; the number of a launch that more than one case is about comes first.
        model: a model of ``resolving.MODELS`` or below.
        argv: its flags.
        tokens: T at the least when it is planned, more where memory allows it; None when it is
            refused.
        fix: part of the refusal's fix.
        runner: whose experts run a planned one.
        before: how the stock resolution takes it.
    """

    number: str
    model: str
    argv: tuple[str, ...] = LL
    tokens: int | None = None
    fix: str = ""
    runner: str = "moe_plugin"
    env: dict[str, str] = field(default_factory=dict)
    before: str = "accepts"


MORE = {
    name: quantized(method)
    for name, method in {
        "awq": "awq",
        "gptq": "gptq",
        "w8a8-int8": "w8a8_int8",
        "w8a8-fp8": "w8a8_fp8",
        "moe-wna16": "moe_wna16",
        "w4afp8": "w4afp8",
    }.items()
}
MORE["awq"]["quantization_config"] |= {"bits": 4, "group_size": 128, "zero_point": True}
MORE["gptq"]["quantization_config"] |= {"bits": 4, "group_size": 128, "desc_act": False}
MORE["gptq"]["quantization_config"]["sym"] = True
MORE["compressed"] = quantized(
    "compressed-tensors",
    config_groups={
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True,
                "dynamic": False,
            },
            "input_activations": {
                "num_bits": 8, "type": "float", "strategy": "token", "symmetric": True,
                "dynamic": True,
            },
        }
    },
    format="float-quantized",
)  # fmt: skip

LEAVE = "--moe-a2a-backend none"
LORA = ("--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", "all")
ROWS = (
    Row("1", "qwen3-fp8", LL, tokens=256),
    Row("1 (auto)", "qwen3-fp8", TP8, tokens=256, runner="host"),
    Row("2", "qwen3-fp8", (*LL, "--cuda-graph-max-bs-decode", "128"), tokens=256),
    Row(
        "2 (no prefill graph)",
        "qwen3-fp8",
        (*LL, "--cuda-graph-max-bs-decode", "128", "--disable-prefill-cuda-graph"),
        tokens=256,
    ),
    Row("3", "deepseek-v3", (*LL, *EAGLE, "--cuda-graph-max-bs-decode", "128"), tokens=512),
    Row("4", "qwen3-fp8", LL, env={CAPACITY: "2048"}, fix=f"{CAPACITY}=1024"),
    Row("4 (FP8 rows)", "qwen3-fp8", LL, env={CAPACITY: "8"}, fix=f"{CAPACITY}=16"),
    Row("4 (chunk)", "qwen3-fp8", (*LL, "--chunked-prefill-size", "65536"), fix="-size 8192"),
    Row("5", "qwen3", LL, tokens=256),
    Row("5 (normal prefill)", "qwen3", TP8, fix="--moe-runner-backend deep_gemm"),
    Row("6", "qwen3", LL, env={"SGLANG_DEEPEP_BF16_DISPATCH": "1"}, tokens=256),
    Row("7", "qwen3", (*LL, "--moe-runner-backend", "deep_gemm"), tokens=256, runner="host"),
    Row("8", "qwen3-fp8", (*LL, "--moe-runner-backend", "triton"), fix="backend auto"),
    Row(
        "9",
        "qwen3-tensor",
        (*LL, "--moe-runner-backend", "deep_gemm"),
        env={"SGLANG_ENABLE_JIT_DEEPGEMM": "0"},
        fix="SGLANG_ENABLE_JIT_DEEPGEMM",
    ),
    Row("9 (ours)", "qwen3-fp8", LL, env={"SGLANG_ENABLE_JIT_DEEPGEMM": "0"}, tokens=256),
    Row("10", "qwen3-tensor", LL, tokens=256),
    Row("11", "compressed", LL, tokens=256),
    Row("12 (w8a8_int8)", "w8a8-int8", LL, fix=LEAVE),
    Row("12 (w8a8_fp8)", "w8a8-fp8", LL, tokens=256),
    Row("12 (moe_wna16)", "moe-wna16", (*LL, "--quantization", "moe_wna16"), fix=LEAVE),
    Row("12b (awq)", "awq", LL, tokens=256),
    Row("12b (gptq)", "gptq", LL, tokens=256),
    Row("13", "w4afp8", LL, tokens=256, runner="host"),
    Row("14", "gpt-oss", LL, fix=LEAVE),
    Row("15", "mixtral", LL, fix=LEAVE),
    Row("16", "qwen3-gelu", LL, fix=LEAVE),
    Row("17 (hidden)", "qwen3-hidden", LL, fix=LEAVE),
    Row("17 (top-k)", "qwen3-topk", LL, fix=LEAVE),
    Row("17 (experts)", "qwen3-126", LL, fix="--ep-num-redundant-experts 2"),
    Row("17 (LoRA)", "qwen3-fp8", (*LL, *LORA), fix="remove --enable-lora"),
    Row("18", "qwen3-fp8", (*LL, "--enable-single-batch-overlap"), fix="remove --enable-single"),
    Row("20", "qwen3-fp8", (*TP8, "--deepep-mode", "normal"), tokens=0),
    Row(
        "21",
        "qwen3-fp8",
        TP8,
        env={"SGLANG_ENABLE_JIT_DEEPGEMM": "0"},
        fix="--deepep-mode low_latency",
    ),
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """(before, after) of every row, by number: one process, stock cases first."""
    paths = write_models(tmp_path_factory.mktemp("models"), MORE)
    cases = [
        {"argv": ["--model-path", paths[row.model], *_with_draft(row, paths)], "env": row.env}
        for row in ROWS
    ]
    worker = Worker(paths["qwen3"])
    try:
        found = worker.ask([*({**case, "stock": True} for case in cases), *cases])
    finally:
        worker.close()
    before, after = found[: len(ROWS)], found[len(ROWS) :]
    return {
        row.number: pair for row, pair in zip(ROWS, zip(before, after, strict=True), strict=True)
    }


def _with_draft(row: Row, paths: dict[str, str]) -> list[str]:
    argv = list(row.argv)
    if "--speculative-algorithm" in argv and row.model != "deepseek-v3":
        argv += ["--speculative-draft-model-path", paths[row.model]]
    return argv


@pytest.mark.parametrize("row", ROWS, ids=[row.number for row in ROWS])
def test_launch(row: Row, answers: dict[str, tuple[Any, Any]]) -> None:
    """Before: accepted, to die minutes later. After: refused in the first second, or planned."""
    before, after = answers[row.number]
    assert before["ok"], before["error"]
    assert before["plan"] is None
    if row.tokens is None:
        assert not after["ok"]
        assert after["errors"], after["error"]
        assert row.fix in " ".join(error["fix"] for error in after["errors"]), after["error"]
        return
    assert after["ok"], after["error"]
    if row.tokens == 0:  # works on the stock host, and stays its own
        assert after["plan"] is None
        return
    assert after["plan"]["max_dispatch_tokens_per_rank"] >= row.tokens
    assert after["plan"]["runner"] == row.runner


def test_19_deep_ep_missing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """On a GPU without deep_ep: refused early; never a silent torch transport."""
    paths = write_models(tmp_path_factory.mktemp("models"))
    argv = ["--model-path", paths["qwen3"], *LL]
    worker = Worker(paths["qwen3"])
    try:
        missing, torch = worker.ask(
            [
                {"argv": argv, "without": "deep_ep"},
                {"argv": argv, "without": "deep_ep", "env": {"MOE_PLUGIN_TRANSPORT": "torch"}},
            ]
        )
    finally:
        worker.close()
    assert missing["type"] == "UnsupportedError"
    assert "MOE_PLUGIN_TRANSPORT=torch" in missing["error"]
    assert torch["plan"]["transport"] == "torch"
