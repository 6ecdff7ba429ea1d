"""Under ``auto`` nothing that the stock host runs is refused, and every printed fix is one.

Launches on named devices, resolved by the real host. A launch is *planned*, *left alone* (the
stock host runs it, and we do not act), or refused; then all changes of the refusal are made, and
the host is asked again. Why the stock host fails where it is refused stands beside each row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_plugin.integration.resolve.installation import foreign_device

from ..support.changes import after
from ..support.hosts import host_result, program
from ..support.resolving import (
    DEEPSEEK_V3,
    FP8_BLOCK,
    MODELS,
    QWEN3_30B,
    Worker,
    quantized,
    variant,
    write_models,
)  # fmt: skip

TP8 = ("--tp-size", "8", "--attn-dp-size", "8")
DEEPEP = (*TP8, "--moe-a2a-backend", "deepep")
LL = (*DEEPEP, "--deepep-mode", "low_latency")
ON = ("--use-batched-dp-moe", "on")
CUTEDSL = ("--moe-runner-backend", "flashinfer_cutedsl")
HUMMING = ("--moe-runner-backend", "humming")
FEW = ("--cuda-graph-max-bs-decode", "128", "--max-running-requests", "1024")
NO_JIT = {"SGLANG_ENABLE_JIT_DEEPGEMM": "0"}
BF16_ROWS = {"SGLANG_DEEPEP_BF16_DISPATCH": "1"}
CAPACITY = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
_FP4_GROUP = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
NVFP4 = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "input_activations": _FP4_GROUP, "weights": _FP4_GROUP, "targets": ["Linear"]
        }
    },
    "producer": {"name": "modelopt"},
}  # fmt: skip
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32,
                "symmetric": True, "dynamic": False,
            },
        }
    },
}  # fmt: skip


def int4(**more: Any) -> dict[str, Any]:
    """INT4 with another description of its weights."""
    group = INT4["config_groups"]["group_0"]
    return {**INT4, "config_groups": {"group_0": group | {"weights": group["weights"] | more}}}


MINIMAX = variant(
    QWEN3_30B, architectures=["MiniMaxM2ForCausalLM"], model_type="minimax_m2", hidden_size=3072,
    num_local_experts=256, quantization_config=NVFP4,
)  # fmt: skip
LONGCAT = variant(
    QWEN3_30B, architectures=["LongcatFlashForCausalLM"], model_type="llama",
    n_routed_experts=512, moe_topk=12,
)  # fmt: skip
MORE = {
    "r1-fp4": variant(DEEPSEEK_V3, quantization_config=NVFP4),
    "r1-w4afp8": variant(DEEPSEEK_V3, quantization_config={"quant_method": "w4afp8"}),
    "r1-fp4-experts": variant(
        DEEPSEEK_V3, quantization_config={**FP8_BLOCK, "routed_experts_quant_method": "mxfp4"}
    ),
    "kimi-int4": variant(MODELS["kimi-k2"], quantization_config=INT4),
    "qwen3-fp4": variant(QWEN3_30B, quantization_config=NVFP4),
    "kimi-int4-ordered": variant(MODELS["kimi-k2"], quantization_config=int4(actorder="group")),
    "kimi-int4-zeros": variant(MODELS["kimi-k2"], quantization_config=int4(symmetric=False)),
    "qwen3-int8": quantized("w8a8_int8"),
    "qwen3-modelopt-fp8": quantized("modelopt", quant_algo="FP8", ignore=["lm_head"]),
    "qwen3-awq": quantized("awq", bits=4, group_size=128, zero_point=True),
    "qwen3-awq-704": variant(
        quantized("awq", bits=4, group_size=128, zero_point=True), moe_intermediate_size=704
    ),
    "minimax-fp4": MINIMAX,
    "longcat": LONGCAT,
    "mixtral-fp8": variant(MODELS["mixtral"], quantization_config=FP8_BLOCK),
    "mixtral-fp4": variant(MODELS["mixtral"], quantization_config=NVFP4),
}


@dataclass(frozen=True)
class Row:
    """One launch.

    Attributes:
        name: what it is about.
        model: a model of ``resolving.MODELS`` or above.
        argv: its flags; ``{adapter}`` is a directory with an adapter of the experts.
        want: ``planned``, ``alone``, ``not batched``, or ``refused``.
        env: its variables.
        runner: whose experts, where it is planned.
        says: part of the refusal, or of the line that says why it is left alone.
        target: the device.
    """

    name: str
    model: str
    argv: tuple[str, ...]
    want: str
    env: dict[str, str] = field(default_factory=dict)
    runner: str = "host"
    says: str = ""
    target: str = "h200"


LORA = ("--enable-lora", "--max-lora-rank", "16", "--lora-target-modules")
ROWS = (
    # The host wraps the experts only if both of their projections are targets.
    Row("LoRA on attention", "qwen3-fp8", (*DEEPEP, *LORA, "q_proj", "o_proj", *FEW), "planned"),
    Row("LoRA on one of both", "qwen3-fp8", (*DEEPEP, *LORA, "down_proj", *FEW), "planned"),
    Row("LoRA on experts", "qwen3-fp8", (*LL, *LORA, "up_proj", "down_proj"), "refused",
        says="LoRA"),
    Row("LoRA on everything", "qwen3-fp8", (*LL, *LORA, "all"), "refused", says="LoRA"),
    Row("adapter of experts", "qwen3-fp8", (*LL, "--lora-paths", "a={adapter}"), "refused",
        says="LoRA"),
    # The host decides about DeepEP after budgets and memory.
    Row("waterfill alone", "deepseek-v3", (*TP8, "--enable-waterfill", *FEW), "planned"),
    Row("waterfill, low latency", "deepseek-v3", (*LL, "--enable-waterfill"), "planned"),
    Row("waterfill, bf16", "qwen3", (*LL, "--enable-waterfill"), "refused", says="waterfill"),
    Row("context parallel, DSA", "glm5",
        ("--tp-size", "8", "--enable-prefill-cp", "--cp-strategy", "zigzag", *FEW), "planned"),
    Row("context parallel, MLA", "deepseek-v3",
        ("--tp-size", "8", "--enable-prefill-cp", "--cp-strategy", "zigzag", *FEW), "planned"),
    # Only the stock host runs it, or may.
    Row("variable that is no number", "qwen3-fp8", LL, "alone", {CAPACITY: "many"}, says=CAPACITY),
    Row("a capacity that graphs of ours do not suit", "qwen3",
        (*LL, "--moe-runner-backend", "deep_gemm"), "alone", {CAPACITY: "100"}, says="100"),
    Row("a capacity that FP8 rows do not suit", "qwen3-fp8", DEEPEP, "refused",
        {CAPACITY: "100"}, says="FP8 rows"),
    Row("plain experts", "mixtral-fp8", LL, "alone", says="MixtralForCausalLM"),
    Row("plain experts, bf16", "mixtral", LL, "refused", says="unquantized"),
    Row("zero experts", "longcat", (*LL, "--trust-remote-code"), "alone", says="Longcat"),
    Row("zero experts, on", "longcat", (*TP8, *ON), "refused", says="Longcat"),
    Row("odd blocks", "qwen3-odd-blocks", DEEPEP, "alone", says="fp8_block[64, 128]"),
    # Marlin and TRT-LLM have functions for no dispatch but their own; CuteDSL needs Blackwell.
    Row("NVFP4, Hopper", "qwen3-fp4", (*TP8, *ON), "refused", says="modelopt_fp4"),
    Row("NVFP4, CuteDSL on Hopper", "r1-fp4", (*LL, *CUTEDSL, "--quantization", "modelopt_fp4"),
        "refused", says="compute capability 10.0"),
    Row("NVFP4, Blackwell", "r1-fp4", LL, "refused", says="flashinfer_cutedsl", target="b200"),
    Row("NVFP4, auto mode", "r1-fp4", DEEPEP, "refused", says="flashinfer_cutedsl", target="b200"),
    Row("NVFP4, a runner of the host's choice", "minimax-fp4", LL, "refused",
        says="flashinfer_cutedsl", target="b200"),
    Row("NVFP4, mode unset", "r1-fp4",
        (*DEEPEP, *CUTEDSL, "--disaggregation-mode", "decode", *FEW), "planned", target="b200"),
    # Its kernel takes FP8 rows alone, and the layer insists on DeepGEMM.
    Row("W4AFP8", "r1-w4afp8", LL, "planned"),
    Row("W4AFP8, another runner", "r1-w4afp8", (*LL, "--moe-runner-backend", "deep_gemm"),
        "planned"),
    Row("W4AFP8, bf16 rows", "r1-w4afp8", (*LL, "--deepep-dispatcher-output-dtype", "bf16"),
        "refused", says="dispatched rows"),
    Row("W4AFP8, bf16 rows by variable", "r1-w4afp8", LL, "refused", BF16_ROWS,
        says="dispatched rows"),
    Row("W4AFP8, FP8 rows in prefill", "r1-w4afp8",
        (*DEEPEP, "--deepep-dispatcher-output-dtype", "fp8"), "refused", says="normal dispatch"),
    Row("W4AFP8 without DeepGEMM", "r1-w4afp8", (*TP8, *ON), "refused", NO_JIT,
        says="SGLANG_ENABLE_JIT_DEEPGEMM"),
    Row("W4AFP8, Ampere", "r1-w4afp8", LL, "refused", says="compute capability", target="a100"),
    # Its functions take what its own method prepared: nothing of bf16 or FP8 checkpoints.
    Row("humming, bf16", "qwen3", (*TP8, *ON, *HUMMING), "refused", says="humming"),
    Row("humming, FP8", "deepseek-v3", (*LL, *HUMMING), "refused", says="humming"),
    Row("humming by quantization", "kimi-int4", (*LL, "--quantization", "humming"), "planned"),
    Row("FP4 experts, Hopper", "r1-fp4-experts", LL, "planned", runner="moe_plugin"),
    Row("FP4 experts, DeepGEMM", "r1-fp4-experts", (*LL, "--moe-runner-backend", "deep_gemm"),
        "refused", says="--moe-runner-backend auto"),
    Row("FP4 experts, humming", "r1-fp4-experts", (*LL, *HUMMING), "planned"),
    Row("int4", "kimi-int4", LL, "planned", runner="moe_plugin"),
    Row("int4, FP8 rows", "kimi-int4", (*LL, "--deepep-dispatcher-output-dtype", "fp8"),
        "refused", says="compressed-tensors_int4"),
    Row("int4, ordered by activation", "kimi-int4-ordered", LL, "refused",
        says="compressed-tensors"),
    Row("int4 with zero points", "kimi-int4-zeros", LL, "refused", says="compressed-tensors"),
    Row("awq", "qwen3-awq", LL, "planned", runner="moe_plugin"),
    Row("awq, sizes that no groups fill", "qwen3-awq-704", LL, "refused", says="awq_marlin"),
    # The variable moves layers of every backend, and of whatever dtype of rows.
    Row("W4AFP8 over nixl, variable", "r1-w4afp8", (*TP8, "--moe-a2a-backend", "nixl"), "refused",
        env=BF16_ROWS, says="SGLANG_DEEPEP_BF16_DISPATCH takes"),
    Row("W4AFP8, FP8 rows, variable", "r1-w4afp8",
        (*LL, "--deepep-dispatcher-output-dtype", "fp8"), "refused", env=BF16_ROWS,
        says="unset SGLANG_DEEPEP_BF16_DISPATCH"),
    # What the checkpoint says of itself wins over what is typed.
    Row("W4AFP8 on ModelOpt's FP8", "qwen3-modelopt-fp8", (*LL, "--quantization", "w4afp8"),
        "refused", says="modelopt_fp8 weights"),
    # Over DeepEP the host takes 0 for unset.
    Row("prefill graphs of 0", "qwen3", (*LL, "--cuda-graph-max-bs-prefill", "0"), "planned",
        runner="moe_plugin"),
    # Only estimates speak against it: the host has room for the buffer at its own T.
    Row("a typed fraction, tight", "kimi-k2",
        ("--tp-size", "16", "--moe-a2a-backend", "deepep", "--mem-fraction-static", "0.87"),
        "alone", says="device memory", target="h100"),
    # One refusal, not one per start.
    Row("on, another backend, no experts", "qwen3-int8", (*TP8, *ON, "--moe-a2a-backend", "nixl"),
        "refused", says="w8a8_int8"),
    Row("on, normal mode, a large chunk", "qwen3",
        (*DEEPEP, *ON, "--deepep-mode", "normal", "--chunked-prefill-size", "65536"), "refused",
        says="--chunked-prefill-size 8192"),
)  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """(answer, answer after all changes of its refusal, or None) of every row, by name."""
    more = {
        **MORE,
        "qwen3-odd-blocks": variant(
            QWEN3_30B, quantization_config={**FP8_BLOCK, "weight_block_size": [64, 128]}
        ),
    }
    models = write_models(tmp_path_factory.mktemp("models"), more)
    adapter = tmp_path_factory.mktemp("adapter")
    modules = {"r": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"]}
    Path(adapter, "adapter_config.json").write_text(json.dumps(modules))
    found: dict[str, tuple[Any, Any]] = {}
    for target in sorted({row.target for row in ROWS}):
        rows = [row for row in ROWS if row.target == target]
        cases = [
            {
                "argv": [
                    "--model-path", models[row.model],
                    *(
                        item.replace("{adapter}", str(adapter)).replace(
                            "{model}", models[row.model]
                        )
                        for item in row.argv
                    ),
                ],
                "env": row.env,
                "log": True,
            }
            for row in rows
        ]  # fmt: skip
        worker = Worker(models["qwen3"], target)
        try:
            first = worker.ask(cases)
            pairs = zip(cases, first, strict=True)
            second = worker.ask(after(case, _changes(answer)) for case, answer in pairs)
        finally:
            worker.close()
        found |= {
            row.name: pair for row, pair in zip(rows, zip(first, second, strict=True), strict=True)
        }
    return found


def _changes(answer: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [(name, value) for error in answer.get("errors", ()) for name, value in error["changes"]]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_launch(row: Row, answers: dict[str, tuple[Any, Any]]) -> None:
    """Planned, left alone with a line, or refused with a fix that the host accepts."""
    answer, fixed = answers[row.name]
    if row.want == "refused":
        assert not answer["ok"], answer["log"]
        assert answer["errors"], answer["error"]
        assert row.says in answer["error"]
        assert fixed["ok"], fixed["error"]
        return
    assert answer["ok"], answer["error"]
    if row.want == "not batched":
        assert answer["plan"] is None
        assert "leaves this launch alone" not in answer["log"]
        return
    if row.want == "alone":
        assert answer["plan"] is None
        assert "leaves this launch alone" in answer["log"]
        assert row.says in answer["log"]
        assert answer["environment"].get(CAPACITY) in (None, *row.env.values())
        return
    assert answer["plan"]["runner"] == row.runner
    assert answer["plan"]["verdict"] == "ok"


@pytest.mark.parametrize(("device", "foreign"), [("cuda", False), ("cpu", False), ("npu", True)])
def test_other_devices_are_the_hosts_alone(device: str, foreign: bool) -> None:
    """DeepEP's host names are the same on NPUs; its kernels and T are not."""
    assert bool(foreign_device(SimpleNamespace(device=device))) == foreign


def test_a_mistake_of_ours_breaks_no_launch(models: dict[str, str]) -> None:
    """``auto`` goes on without us; ``on`` shows it."""
    left, on = host_result(program("planning_mistake"), models["qwen3"])
    assert left == "left alone: planning failed: ZeroDivisionError: a bug"
    assert on == "ZeroDivisionError"
