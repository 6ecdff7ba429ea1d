"""What `batched_experts` refuses, with a reason: kernels read tensors as they were described."""

from typing import Any

import torch

from .expert_layer import rows_scale_spec, weight_specs
from .formats import FORMATS, SCALE_BLOCK
from .launch import Shape
from .packing import STRIP
from .problem import Spec
from .weights import ExpertWeights


def refusal(what: str, got: object, allowed: object, fix: str) -> ValueError:
    """An error of the project's one shape."""
    return ValueError(f"{what}: got {got}, allowed {allowed}. Fix: {fix}")


def check_layer(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weights: ExpertWeights,
    masked_m: torch.Tensor,
    out: torch.Tensor | None,
) -> Shape:
    """The layer's shape.

    Raises:
        ValueError: a tensor whose shape, dtype, layout or device the kernels would misread.
    """
    if x.dim() != 3 or weights.w2.dim() != 3:
        got = f"{tuple(x.shape)} and {tuple(weights.w2.shape)}"
        raise refusal("hidden_states and w2", got, "[L, M, H] and [L, H, I]", "batch by expert")
    fmt = weights.format
    if FORMATS.get(fmt.name) != fmt:
        raise refusal("format", fmt.name, ", ".join(FORMATS), "run the host's own experts")
    experts, capacity, hidden = x.shape
    # The depth of packed weights is rounded up: their width tells the size.
    inter = weights.w13.shape[1] * STRIP // 2 if fmt.packed else weights.w2.shape[2]
    shape = Shape(experts, capacity, hidden, inter, fmt, weights.activation)
    if fmt.packed and weights.activation.interleaved:
        fix = "pack gates before ups"
        raise refusal(f"gates and ups of {fmt.name}", "taking turns", "gates before ups", fix)
    multiple = SCALE_BLOCK if fmt.fp8_rows else 16
    for name, size, step in (("hidden", hidden, multiple), ("intermediate", shape.inter, 16)):
        if size % step or not size:
            fix = "pad rows and weights with zeros"
            raise refusal(f"{name} size of {fmt.name}", size, f"multiples of {step}", fix)
    rows_dtype = torch.float8_e4m3fn if fmt.fp8_rows else torch.bfloat16
    wanted = weight_specs(shape)
    for name in ("w13", "w2"):
        _check(name, getattr(weights, name), getattr(wanted, name), x.device, strided=True)
        for more in (f"{name}_scale", f"{name}_bias"):
            _check(more, getattr(weights, more), getattr(wanted, more), x.device)
    rows = Spec((experts, capacity, hidden), rows_dtype)
    _check("hidden_states", x, rows, x.device, strided=True)
    _check("hidden_states_scale", x_scale, rows_scale_spec(shape), x.device, any_strides=True)
    _check("masked_m", masked_m, Spec((experts,), torch.int32), x.device)
    if out is not None:
        _check("out", out, Spec((experts, capacity, hidden), torch.bfloat16), x.device)
    return shape


def _check(
    name: str,
    tensor: Any,
    wanted: Spec | None,
    device: torch.device,
    *,
    strided: bool = False,
    any_strides: bool = False,
) -> None:
    """Refuse what is not as wanted: dense, or `strided` with dense channels, or any strides."""
    if tensor is None and wanted is None:
        return
    if tensor is None or wanted is None:
        got, allowed = ("nothing", "a tensor") if tensor is None else ("a tensor", "nothing")
        raise refusal(name, got, allowed, "give what format and activation say, nothing else")
    if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
        got = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise refusal(name, got, f"{wanted.shape} {wanted.dtype}", "see batched_experts")
    if tensor.device != device:
        raise refusal(f"device of {name}", tensor.device, device, f"move it to {device}")
    if any_strides or tensor.is_contiguous() or (strided and tensor.stride(-1) == 1):
        return
    allowed = "adjacent channels" if strided else "a dense tensor"
    raise refusal(f"strides of {name}", tensor.stride(), allowed, ".contiguous()")
