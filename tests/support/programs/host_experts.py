"""Ask the host's own classes what computes a weight format behind DeepEP's low latency.

Run as a program in a process of its own: it builds ``DeepEPMoE`` for every format and runner, with
the host's quantisation method, runner and gate, but without weights and dispatcher, and prints a
JSON object: "format runner" -> what takes low-latency rows, or why nothing does.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("SGLANG_PLATFORM", "moe_plugin_cpu")

import torch
from sglang.srt.layers import deep_gemm_wrapper
from sglang.srt.layers.moe.ep_moe import layer as ep_layer
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.base import PermuteMethodPool
from sglang.srt.layers.moe.utils import DeepEPMode, MoeA2ABackend, MoeRunnerBackend
from sglang.srt.layers.quantization import QUANTIZATION_METHODS, modelopt_quant, mxfp4
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.runtime_context import get_context, get_flags

RUNNERS = (
    "auto", "deep_gemm", "triton", "triton_kernel", "flashinfer_cutedsl", "cutlass", "marlin",
    "humming", "lora_triton", "lora_cutedsl", "lora_marlin",
)  # fmt: skip
"""Runners without a check of their own in resolution, and the one that NVFP4 needs."""


def _fp8(block: list[int] | None, **marks: bool) -> Any:
    config = Fp8Config(True, "dynamic" if block else "static", weight_block_size=block)
    for name, value in marks.items():
        setattr(config, name, value)
    return config


def _from(name: str, **config: Any) -> Any:
    return QUANTIZATION_METHODS[name].from_config({"quant_method": name, **config})


def configs() -> dict[str, Any]:
    """A quantisation config of the host by our format's name."""
    channel = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    token = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": {**channel, "dynamic": False},
                          "input_activations": {**token, "dynamic": True}}}  # fmt: skip
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    int4 = {"group_0": {"targets": ["Linear"], "weights": {**four, "dynamic": False}}}
    return {
        "unquantized": None,
        "fp8_block": _fp8([128, 128]),
        "fp8_tensor": _fp8(None),
        "fp8_fp4": _fp8([128, 128], is_fp4_experts=True),
        "w4afp8": _from("w4afp8"),
        "humming": QUANTIZATION_METHODS["humming"](
            {
                "quant_method": "gptq",
                "bits": 4,
                "group_size": 128,
                "desc_act": False,
                "sym": True,
            }
        ),
        "modelopt_fp4": modelopt_quant.ModelOptFp4Config(True, None, 16, []),
        "mxfp4": mxfp4.Mxfp4Config(is_checkpoint_mxfp4_serialized=True),
        "modelopt_fp8": modelopt_quant.ModelOptFp8Config(True),
        "w8a8_fp8": _from("w8a8_fp8"),
        "blockwise_int8": QUANTIZATION_METHODS["blockwise_int8"](True, "dynamic", [], [128, 128]),
        "compressed-tensors": _from(
            "compressed-tensors", format="float-quantized", config_groups=groups, ignore=[]
        ),
        "compressed-tensors_int4": _from(
            "compressed-tensors", format="pack-quantized", config_groups=int4, ignore=[]
        ),
    }


def _bare_init(layer: Any, **options: Any) -> None:
    """``FusedMoE.__init__`` without weights and dispatcher."""
    torch.nn.Module.__init__(layer)
    asked, config = get_flags().moe.runner_backend, options["quant_config"]
    layer.quant_config = config
    layer.use_triton_kernels = asked.is_triton_kernels()
    layer.use_flashinfer_trtllm_moe = False
    layer.w13_weight = torch.empty(1, dtype=torch.bfloat16)
    layer.num_local_experts = layer.num_experts = 8
    layer.quant_method = (
        config.get_quant_method(layer, "model.layers.0.mlp.experts")
        if config is not None
        else UnquantizedFusedMoEMethod(
            layer.use_triton_kernels, False, asked.is_deep_gemm() or asked.is_lora()
        )
    )
    runner = MoeRunnerConfig(num_experts=8, num_local_experts=8, hidden_size=256, layer=None)
    layer.quant_method.create_moe_runner(layer, runner)
    layer.runner_backend = layer.quant_method.get_moe_runner_backend(layer)


def takes(config: Any, runner: str) -> str:
    """``ok: NAME`` of what takes the rows, or why nothing does."""
    flags = get_flags().moe
    flags.runner_backend = MoeRunnerBackend(runner)
    try:
        layer = ep_layer.DeepEPMoE(
            num_experts=8, top_k=2, hidden_size=256, intermediate_size=128, layer_id=0,
            quant_config=config,
        )  # fmt: skip
        if not layer.deprecate_flag:
            return "ok: cutlass" if layer.use_w4afp8 else "fails: forward_deepgemm_masked"
        made = layer.quant_method.runner
        if made is None:
            return "fails: its method makes no runner"
        if made.fused_func is None:
            PermuteMethodPool.get_pre_permute("deepep_ll", made.runner_core.runner_backend.value)
        return f"ok: {made.runner_backend.value}"
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}"


def main(capability: tuple[int, int]) -> None:
    """Print the answers for a CUDA device of a compute capability."""
    get_context().override_server_args().install()
    flags = get_flags().moe
    flags.a2a_backend, flags.deepep_mode = MoeA2ABackend.DEEPEP, DeepEPMode.LOW_LATENCY
    blackwell = capability >= (10, 0)
    platform = SimpleNamespace(
        is_blackwell=blackwell, is_sm100=blackwell, is_sm90=not blackwell, is_sm120=False,
        is_hip=False, is_npu=False, is_cuda=True,
    )  # fmt: skip
    patches = {
        (FusedMoE, "__init__"): _bare_init,
        (deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM"): True,
        (modelopt_quant, "is_cuda"): lambda: True,
        (modelopt_quant, "get_device_capability"): lambda: capability,
        (modelopt_quant, "get_platform"): lambda: platform,
    }
    for (owner, name), value in patches.items():
        mock.patch.object(owner, name, value).start()
    found = {
        f"{name} {runner}": takes(config, runner)
        for name, config in configs().items()
        for runner in RUNNERS
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main((int(sys.argv[1]), int(sys.argv[2])))
