"""What the host's layers hold, as our experts take it: which attributes carry weights and scales.

By quantization method of the host:

    none                            w13_weight and w2_weight in bf16 (float32 on CPU)
    Fp8MoEMethod, blocks            w13_weight_scale_inv [L, blocks down, blocks across]
    Fp8MoEMethod, per tensor        w13_weight_scale [L]: gate and up share the larger one
    CompressedTensorsW8A8Fp8MoE     w13_weight_scale: [L], [L, 2I, 1], or blocks
    W8A8FP8MoEMethod                w13_weight_scale [L, 2I, 1]
    int4                            see `packed_weights`, which repacks it once

and the same of w2. Rows are dispatched in FP8 with a scale per 128 channels in every FP8 format:
finer than one per token, and than the static one per tensor that a checkpoint may bring, which is
not read. Nothing is copied, so that weights that the host replaces in place stay the ones read.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ...errors import UnsupportedError, explain
from ...kernels.formats import (
    BF16,
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    SCALE_BLOCK,
    Activation,
    Format,
)
from ...kernels.weights import ExpertWeights
from ...planning.leaving import LEAVE_TEXT
from .packed_layouts import stored_codes
from .packed_weights import codes_and_scales, packed_format


def expert_weights(layer: Any) -> ExpertWeights:
    """The layer's weights, as they are now; no copy."""
    if stored_codes(layer, "w13") is not None:
        (w13, s13), (w2, s2) = codes_and_scales(layer, "w13"), codes_and_scales(layer, "w2")
        return ExpertWeights(w13, w2, s13, s2, packed_format(layer), layer_activation(layer))
    w13, w2, activation = layer.w13_weight, layer.w2_weight, layer_activation(layer)
    if w13.dtype.itemsize > 1:
        return ExpertWeights(w13, w2, activation=activation)
    fmt, scale13 = _scale(layer, "w13", w13)
    _, scale2 = _scale(layer, "w2", w2)
    return ExpertWeights(w13, w2, scale13, scale2, fmt, activation)


def loaded_format(layer: Any) -> Format:
    """The format that the layer has once its weights are loaded; they may still be placeholders."""
    if stored_codes(layer, "w13") is not None:
        return packed_format(layer)
    method = getattr(layer, "quant_method", None)
    if getattr(method, "is_fp4_expert", False) and getattr(method, "dequant_fp4_to_fp8", False):
        return FP8_BLOCK  # the host turns FP4 into FP8 blocks as it loads it
    if layer.w13_weight.dtype.itemsize == 1:
        return _scale(layer, "w13", layer.w13_weight)[0]
    if type(method).__name__ != "Fp8MoEMethod":
        return BF16
    # Weights of a bf16 checkpoint that the host quantises as it loads them.
    return FP8_BLOCK if getattr(method, "block_quant", False) else FP8_TENSOR


def _scale(layer: Any, name: str, weight: Any) -> tuple[Format, Any]:
    for attribute in (f"{name}_weight_scale_inv", f"{name}_weight_scale"):
        scale = getattr(layer, attribute, None)
        if scale is not None:
            break
    if scale is None:
        raise _refused(layer, f"scales of {name}", "none", "*_weight_scale or *_weight_scale_inv")
    experts, rows, depth = weight.shape
    shape = tuple(scale.shape)
    if shape in ((experts,), (experts, 2)):  # while it loads, one for gate and one for up
        return FP8_TENSOR, scale
    if shape == (experts, rows, 1):
        return FP8_CHANNEL, scale.squeeze(-1)
    if shape == (experts, -(-rows // SCALE_BLOCK), -(-depth // SCALE_BLOCK)):
        return FP8_BLOCK, scale
    allowed = "one per expert, per output channel, or per 128x128 block"
    raise _refused(
        layer, f"scales of {name}", f"{shape} for weights {tuple(weight.shape)}", allowed
    )


def layer_activation(layer: Any) -> Activation:
    """Of the layer's runner configuration, which some models complete after the layer is made.

    Raises:
        UnsupportedError: one that our experts do not compute.
    """
    config = layer.moe_runner_config
    read = [getattr(config, name, None) for name in ("activation", *_LIMITS)]
    interleaved = bool(getattr(config, "gate_up_interleaved", True))
    found = _activation(*read, interleaved)
    if found is None:
        got = ", ".join(f"{k}={v}" for k, v in zip(("activation", *_LIMITS), read, strict=True))
        raise _refused(layer, "activation", got, "SwiGLU, limited, clamped, or scaled and limited")
    return found


_LIMITS = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "swiglu_limit")


@cache
def _activation(
    name: str, alpha: float | None, beta: float | None, clamp: float | None, limit: float | None,
    interleaved: bool,
) -> Activation | None:  # fmt: skip
    """As the host's Triton fused MoE reads these. A scaled SwiGLU adds one to up, whatever
    ``gemm1_beta`` is; it alone looks at ``gate_up_interleaved``, whose default is true. Where a
    clamp and a limit are both set (GigaChat-3.5), the clamp holds."""
    if name != "silu":
        return None
    clamp, limit = clamp or None, limit or None
    if alpha is not None:
        if clamp is None or beta not in (None, 1.0):
            return None
        return Activation(alpha=alpha, beta=1.0, limit=clamp, interleaved=interleaved)
    if beta:
        return None
    if clamp is not None:
        return Activation("swiglu_clamped", limit=clamp)
    return Activation(limit=limit)


def _refused(layer: Any, what: str, got: str, allowed: str) -> UnsupportedError:
    what = f"MoE layer {layer.layer_id}: {what}"
    return UnsupportedError(explain(what, got=got, allowed=allowed, fix=LEAVE_TEXT))
