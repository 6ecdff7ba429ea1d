"""One layer's local experts as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .formats import BF16, SWIGLU, Activation, Format

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """L local experts, H hidden, I intermediate; the tensors stay the caller's.

    Attributes:
        w13: [L, 2I, H], gate rows then up rows, or taking turns where the activation says so; bf16
            (fp32 for the torch twin), or float8_e4m3fn. Packed formats: int32
            [L, 2I/16, packed_words(H)], all gates before all ups.
        w2: [L, H, I], same dtype. Packed formats: int32 [L, H/16, packed_words(I)].
        w13_scale: None, or float32: per block [L, ceil(2I/128), ceil(H/128)], per channel [L, 2I],
            per tensor [L]. Packed formats: int32 [L, 2I/16, scale_words(H)]; see `packing`.
        w2_scale: None, or float32: per block [L, ceil(H/128), ceil(I/128)], per channel [L, H], per
            tensor [L]. Packed formats: int32 [L, H/16, scale_words(I)].
        format: how they are stored, and rows dispatched.
        activation: what is computed between them.
        w13_bias: None, or [L, 2I] float32.
        w2_bias: None, or [L, H] float32; every expert adds its own before the router's weight.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    format: Format = BF16
    activation: Activation = SWIGLU
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
