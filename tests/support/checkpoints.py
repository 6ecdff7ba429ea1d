"""Public models in the weight formats of checkpoints, as configurations without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .resolving import DEEPSEEK_V3, FP8_BLOCK, MODELS, QWEN3_30B, variant

_QWEN3 = variant(QWEN3_30B, num_hidden_layers=48, vocab_size=151936)
_DEEPSEEK_V3 = variant(
    DEEPSEEK_V3, num_hidden_layers=61, first_k_dense_replace=3, vocab_size=129280
)
_DEEPSEEK_V3.pop("quantization_config")
_GLM = {
    **QWEN3_30B,
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "vocab_size": 151552,
}
_GLM.pop("num_experts")
_DSA = {
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}
BASES: dict[str, dict[str, Any]] = {
    "qwen3-30b": _QWEN3,
    "qwen3-235b": variant(
        _QWEN3,
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_attention_heads=64,
        num_hidden_layers=94,
    ),
    "qwen3-coder-480b": variant(
        _QWEN3,
        hidden_size=6144,
        intermediate_size=8192,
        moe_intermediate_size=2560,
        num_attention_heads=96,
        num_key_value_heads=8,
        num_experts=160,
        num_hidden_layers=62,
    ),
    "qwen3-126": variant(_QWEN3, num_experts=126),
    "deepseek-v3": _DEEPSEEK_V3,
    "deepseek-v3.2": variant(
        _DEEPSEEK_V3, architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32", **_DSA
    ),
    "kimi-k2": variant(
        _DEEPSEEK_V3,
        n_routed_experts=384,
        num_attention_heads=64,
        num_key_value_heads=64,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        first_k_dense_replace=1,
        vocab_size=163840,
    ),
    "glm-4.5": _GLM,
    "minimax-m2": variant(
        _QWEN3,
        architectures=["MiniMaxM2ForCausalLM"],
        model_type="minimax_m2",
        hidden_size=3072,
        intermediate_size=1536,
        num_hidden_layers=62,
        num_attention_heads=48,
        num_key_value_heads=8,
        num_local_experts=256,
        rotary_dim=64,
        use_qk_norm=True,
        use_routing_bias=True,
        scoring_func="sigmoid",
        vocab_size=200064,
    ),
    "gpt-oss": variant(MODELS["gpt-oss"], num_hidden_layers=36, swiglu_limit=7.0),
    "mixtral": variant(MODELS["mixtral"], num_hidden_layers=32, vocab_size=32000),
}
del BASES["minimax-m2"]["num_experts"], BASES["minimax-m2"]["moe_intermediate_size"]
"""By name, unquantised, with all of their layers."""


def _weights(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": False,
        **more,
    }


def _compressed(
    form: str, weights: dict[str, Any], rows: dict[str, Any] | None = None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": rows}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }


_FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
_TOKEN = {**_weights(8, "float", "token"), "dynamic": True}
_STATIC = _weights(8, "float", "tensor")
FORMATS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "fp8-block": FP8_BLOCK,
    "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "static"},
    "ct-fp8-channel": _compressed("float-quantized", _weights(8, "float", "channel"), _TOKEN),
    "ct-fp8-kv": {
        **_compressed("float-quantized", _weights(8, "float", "channel"), _TOKEN),
        "kv_cache_scheme": _STATIC,
    },
    "ct-fp8-tensor": _compressed("float-quantized", _weights(8, "float", "tensor"), _STATIC),
    "ct-fp8-block": _compressed(
        "float-quantized",
        _weights(8, "float", "block", block_structure=[128, 128]),
        {**_weights(8, "float", "group", group_size=128), "dynamic": True},
    ),
    "ct-int4": _compressed("pack-quantized", _weights(4, "int", "group", group_size=32)),
    "ct-nvfp4": _compressed(
        "nvfp4-pack-quantized",
        _weights(4, "float", "tensor_group", group_size=16),
        {**_weights(4, "float", "tensor_group", group_size=16), "dynamic": "local"},
    ),
    "ct-int8": _compressed(
        "int-quantized", _weights(8, "int", "channel"), {**_TOKEN, "type": "int"}
    ),
    "nvfp4": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {"input_activations": _FP4, "weights": _FP4, "targets": ["Linear"]}
        },
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt"},
    },
    "modelopt-fp8": {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt"},
    },
    "w4afp8": {"quant_method": "w4afp8"},
    "mxfp4": {"quant_method": "mxfp4"},
    "mxfp8": {"quant_method": "mxfp8", "activation_scheme": "dynamic"},
    "fp4-experts": {**FP8_BLOCK, "routed_experts_quant_method": "mxfp4"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "dynamic": {},
    },
    "w8a8-fp8": {"quant_method": "w8a8_fp8"},
    "w8a8-int8": {"quant_method": "w8a8_int8"},
    "int8-block": {
        "quant_method": "blockwise_int8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
"""By name: ``quantization_config``; None without one."""
FEW_LAYERS = 4


def checkpoint(base: str, form: str, *, whole: bool) -> dict[str, Any]:
    """Configuration of ``base`` in a format, with all of its layers or a few."""
    config = dict(BASES[base])
    if not whole:
        config["num_hidden_layers"] = FEW_LAYERS
        if "first_k_dense_replace" in config:
            config["first_k_dense_replace"] = 1
    quantization = FORMATS[form]
    return config if quantization is None else {**config, "quantization_config": quantization}


def write_checkpoints(directory: Path) -> dict[str, str]:
    """Every model in every format, whole and with few layers: "base/format/whole" -> path."""
    paths = {}
    for base in BASES:
        for form in FORMATS:
            for depth in ("whole", "few"):
                path = directory / base / form / depth
                path.mkdir(parents=True, exist_ok=True)
                config = checkpoint(base, form, whole=depth == "whole")
                (path / "config.json").write_text(json.dumps(config))
                paths[f"{base}/{form}/{depth}"] = str(path)
    return paths
