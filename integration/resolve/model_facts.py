"""Facts of a model's routed experts, read from the host's ``ModelConfig``."""

from __future__ import annotations

import os
from typing import Any

from ...planning.facts import ModelFacts
from ...planning.host_models import FUSED_SHARED, MIXTRAL_FORMATS, NO_DISPATCHER, WRAPS
from .host_environment import environment_bool
from .int4_facts import INT4, is_int4
from .weight_facts import weights_of

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)
# Clamped or scaled SwiGLU (DeepSeek-V4, Step-3.5, MiniMax-M3, ...): the models hand these to the
# host's experts as swiglu_limit, gemm1_alpha or gemm1_clamp_limit.
_ACTIVATION_LIMITS = (
    "swiglu_limit", "swiglu_limits", "swiglu_alpha", "expert_swiglu_limit_list",
    "activation_situ_beta",
)  # fmt: skip
_CLAMP_ALONE = frozenset({"Step3p5ForCausalLM", "BailingMoeV3ForCausalLM", "GigaChat35ForCausalLM"})
"""Models whose experts clamp by ``gemm1_clamp_limit``, which the host's DeepGEMM ignores."""
_ONLINE_HUMMING = "SGLANG_HUMMING_ONLINE_QUANT_CONFIG"
_TRANSFORMERS = "TransformersMoEForCausalLM"
_HIDDEN = ("routed_expert_hidden_size", "hidden_size")
_INTERMEDIATE = ("moe_intermediate_size", "moe_hidden_size", "intermediate_size")


def _first(config: Any, names: tuple[str, ...]) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):  # per layer in a few models
            value = max((item for item in value if isinstance(item, int)), default=None)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def routed_experts(config: Any) -> int:
    """Routed experts of one layer in a Hugging Face text config; 0 for a dense model."""
    return _first(config, _EXPERTS)


def model_facts(server_args: Any) -> ModelFacts:
    """Facts of the target model, from the host's own ``ModelConfig``."""
    from sglang.srt.arg_groups.overrides import model_config_of

    model = model_config_of(server_args)
    text = model.hf_text_config
    name = architecture(model)
    inner = _wrapped(model, name)
    classes = frozenset({name, inner})
    dtype = str(model.dtype).removeprefix("torch.")
    kind = weight_format(server_args, model)
    return ModelFacts(
        architecture=name,
        wraps=inner,
        hidden_size=_first(text, _HIDDEN),
        num_experts=routed_experts(text),
        top_k=_first(text, _TOP_K),
        moe_intermediate_size=_first(text, _INTERMEDIATE),
        context_length=int(getattr(model, "context_len", 0) or 0),
        dtype=dtype,
        weight_format=kind,
        hidden_act=activation(text, classes),
        fuses_shared=bool(classes & FUSED_SHARED) and bool(getattr(text, "n_shared_experts", 0)),
        has_routed_moe=has_routed_moe(model),
        weights=weights_of(
            str(getattr(model, "model_path", "")),
            text,
            quantization_config(model),
            weight_format=kind,
            dtype=dtype,
            vision=getattr(model.hf_config, "vision_config", None),
        ),
    )


def has_routed_moe(model: Any) -> bool:
    """Whether an all-to-all reaches routed experts of this model."""
    text = model.hf_text_config
    routed = routed_experts(text) > 1 and _first(text, _TOP_K) > 0
    return routed and architecture(model) not in NO_DISPATCHER


def architecture(model: Any) -> str:
    """Class name in the checkpoint, or that of the class which the host loads in its place."""
    if str(getattr(model, "model_impl", "")).rpartition(".")[2].lower() == "transformers":
        return _TRANSFORMERS
    name = str((getattr(model.hf_config, "architectures", None) or [""])[0])
    quantized = getattr(model, "quantization", None)
    if name == "MixtralForCausalLM" and quantized and quantized not in MIXTRAL_FORMATS:
        return "QuantMixtralForCausalLM"
    return name


def _wrapped(model: Any, name: str) -> str:
    """Class of the language model inside a model, where it is known and another one."""
    text = model.hf_text_config
    named = [] if text is model.hf_config else getattr(text, "architectures", None) or []
    return WRAPS.get(name, str(named[0]) if named else "")


def activation(text: Any, classes: frozenset[str]) -> str:
    """Name of the experts' activation, marked where the host clamps or scales it."""
    name = str(getattr(text, "mlp_hidden_act", None) or getattr(text, "hidden_act", None) or "silu")
    limits = [getattr(text, attribute, None) for attribute in _ACTIVATION_LIMITS]
    # Lists are per layer, with nothing or zero where a layer has no limit.
    limited = any(any(value) if isinstance(value, (list, tuple)) else value for value in limits)
    if not limited:
        return name
    return f"{name}, {'clamped' if _CLAMP_ALONE & classes else 'limited'}"


def quantization_config(model: Any) -> dict[str, Any]:
    """The checkpoint's own description of its quantization; empty without one."""
    config = getattr(model.hf_config, "quantization_config", None) or getattr(
        model.hf_text_config, "quantization_config", None
    )
    return config if isinstance(config, dict) else {}


def weight_format(server_args: Any, model: Any) -> str:
    """``unquantized`` or the name of the quantization, refined where runners tell kinds apart."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    name, checked = resolved_view(server_args).quantization, getattr(model, "quantization", None)
    if name is None or name == server_args.quantization:
        name = checked or name  # a checkpoint may overrule what is typed
    return refined_format(name, model)


def refined_format(name: str | None, model: Any) -> str:
    """:func:`weight_format` of a model whose quantization the host calls ``name``."""
    config = quantization_config(model)
    name = name or config.get("quant_method")
    if name == "humming" and not config and not os.environ.get(_ONLINE_HUMMING):
        name = None  # nothing to read and nothing to make: the host leaves the experts as they are
    if not name:
        return "unquantized"
    if getattr(model, "nvfp4_moe_meta", None) is not None and name == "fp8":
        return "fp8_nvfp4"
    dequantised = environment_bool("SGLANG_DSV4_FP4_DEQUANT")
    if getattr(model, "is_fp4_experts", False) and not dequantised:
        return {"fp8": "fp8_fp4", "humming": "humming_fp4"}.get(name, "mxfp4")
    if name == "fp8":
        block = config.get("weight_block_size")
        return "fp8_tensor" if not block else f"fp8_block{'' if block == [128, 128] else block}"
    if name == "compressed-tensors" and _is_fp8(config):
        return "compressed-tensors_fp8"
    text = model.hf_text_config
    depths = _first(text, _HIDDEN), _first(text, _INTERMEDIATE)
    return f"{name}{INT4 if is_int4(str(name), config, depths) else ''}"


def _is_fp8(config: dict[str, Any]) -> bool:
    """Whether every group of a compressed-tensors checkpoint has FP8 weights and rows, with scales
    that our experts read."""
    groups = list((config.get("config_groups") or {}).values())
    for group in groups:
        weights, rows = group.get("weights") or {}, group.get("input_activations") or {}
        for side in (weights, rows):
            if (side.get("type"), side.get("num_bits")) != ("float", 8):
                return False
        kind = weights.get("strategy")
        if kind == "block" and weights.get("block_structure") != [128, 128]:
            return False
        if kind not in ("block", "channel", "tensor"):
            return False
    return bool(groups)
