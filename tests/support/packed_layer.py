"""Layers with 4-bit weights as the host's loader leaves them, before and after their first load."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_plugin.integration.serve.packed_weights import codes_and_scales, take_over_loading
from moe_plugin.kernels.formats import INT4_G32, INT4_G128, INT4_G128_ZERO, MXFP4
from moe_plugin.kernels.packing import E2M1

EXPERTS, HIDDEN, INTER = 3, 384, 128
NAMES = ("w13", "w2")
ORDERS = {
    "CompressedTensorsFusedMoEMethod": ("weight_g_idx", "g_idx_sort_indices"),
    "GPTQMarlinMoEMethod": ("g_idx", "g_idx_sort_indices"),
}
"""Parameters of methods whose inputs may be ordered by activation."""
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the channel that each nibble of AWQ's words holds


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.contiguous(), requires_grad=False)


def words(codes: torch.Tensor, places: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight neighbours of the last dimension in an int32."""
    eights = codes.to(torch.int64).unflatten(-1, (-1, 8))
    packed = sum(eights[..., place] << (4 * at) for at, place in enumerate(places))
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


def in_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Two neighbours of the last dimension in a byte."""
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def host_layer(
    method: str, group: int, zeros: bool, seed: int = 0, inter: int = INTER
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A layer as the method's loader leaves it, and the weights that it stands for."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Module()
    layer.layer_id = 4
    layer.moe_runner_config = SimpleNamespace(activation="silu")
    layer.hidden_size, layer.intermediate_size_per_partition = HIDDEN, inter
    nothing = {"restore_weights_before_loading": lambda _method, _layer: None}  # as most have it
    layer.quant_method = type(method, (), nothing)()
    layer.quant_method.quant_config = SimpleNamespace(weight_bits=4, desc_act=False)
    layer.quant_method.is_fp4_expert = method == "Fp8MoEMethod"
    if method == "CompressedTensorsFusedMoEMethod":
        layer.scheme = SimpleNamespace(num_bits=4, actorder=None)
    stands_for = {}
    sizes = {"w13": (2 * inter, HIDDEN), "w2": (HIDDEN, inter)}
    for name, (rows, depth) in sizes.items():
        codes = torch.randint(0, 16, (EXPERTS, rows, depth), generator=generator)
        scale = torch.rand((EXPERTS, rows, depth // group), generator=generator).bfloat16()
        if method == "Fp8MoEMethod":
            scale = torch.exp2((8 * scale.float()).round() - 7)
            values = torch.tensor(E2M1)[codes & 7] * (1 - 2 * (codes >> 3))
            stands_for[name] = values * scale.repeat_interleave(group, -1)
            stored = {"weight": in_bytes(codes).view(torch.int8), "weight_scale_inv": scale}
            for key, tensor in stored.items():
                layer.register_parameter(f"{name}_{key}", parameter(tensor))
            continue
        zero = torch.randint(0, 16, scale.shape, generator=generator)
        middle = zero.repeat_interleave(group, -1) if zeros else 8
        stands_for[name] = (codes - middle) * scale.float().repeat_interleave(group, -1)
        if method == "CompressedTensorsFusedMoEMethod":
            stored = {"weight_packed": words(codes).mT, "weight_scale": scale.mT}
        elif method == "GPTQMarlinMoEMethod":
            stored = {"qweight": words(codes).mT, "scales": scale.mT.half(),
                      "qzeros": words(zero.mT)}  # fmt: skip
        elif method == "AWQMoEMethod":
            stored = {"qweight": words(codes.mT, AWQ_PLACES), "scales": scale.mT,
                      "qzeros": words(zero.mT, AWQ_PLACES)}  # fmt: skip
        else:
            stored = {"qweight": in_bytes(codes), "scales": scale,
                      "qzeros": in_bytes(zero.mT).mT if zeros else torch.empty(0)}  # fmt: skip
        for key, tensor in stored.items():
            layer.register_parameter(f"{name}_{key}", parameter(tensor))
        for key in ORDERS.get(method, ()):
            order = torch.arange(depth, dtype=torch.int32).expand(EXPERTS, depth)
            layer.register_parameter(f"{name}_{key}", parameter(order))
    return layer, stands_for


CASES = [
    ("CompressedTensorsFusedMoEMethod", INT4_G32),
    ("GPTQMarlinMoEMethod", INT4_G128),
    ("AWQMoEMethod", INT4_G128_ZERO),
    ("MoeWNA16Method", INT4_G32),
    ("MoeWNA16Method", INT4_G128_ZERO),
    ("Fp8MoEMethod", MXFP4),
]


LAYERS = pytest.mark.parametrize(
    ("method", "fmt", "inter"),
    [*((*case, INTER) for case in CASES), *((*c, 96) for c in CASES if c[1].group_size == 32)],
    ids=str,
)
"""Of both widths; a depth of 96 is padded."""


def repacked_layer(method: str, fmt: Any, inter: int, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A layer after its first load, and what kernels read of it as it was loaded."""
    layer, _ = host_layer(method, fmt.group_size, fmt.zero_points, seed, inter)
    unread = ("idx", "indices", *(["qzeros"] if method == "GPTQMarlinMoEMethod" else []))
    named = {name: p for name, p in layer.named_parameters() if not name.endswith((*unread,))}
    loaded = {name: p.detach().clone() for name, p in named.items()}
    take_over_loading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    return layer, loaded


def packed(layer: Any) -> list[torch.Tensor]:
    """Codes and scales of w13, then of w2; copies."""
    return [tensor.detach().clone() for name in NAMES for tensor in codes_and_scales(layer, name)]
