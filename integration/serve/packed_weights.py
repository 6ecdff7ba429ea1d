"""4-bit weights of the host's layers, brought into the order of our kernels when they are loaded.

What the host's methods hold, with K inputs and N output channels of w13 or w2; eight codes to an
int32, lowest first:

    compressed-tensors   weight_packed [L, K/8, N], weight_scale [L, K/group, N], symmetric
    GPTQ                 qweight and scales the same; its Marlin method knows symmetric ones alone
    AWQ                  qweight [L, K, N/8] in AWQ's own order of eight, scales, qzeros alike
    moe_wna16            qweight [L, N, K/2] and qzeros [L, N/2, K/group] in bytes, scales
                         [L, N, K/group]
    FP4 (DeepSeek-V4)    weight [L, N, K/2] in bytes, weight_scale_inv [L, N, K/32], powers of two

Each would be repacked for the host's own kernels. Ours take its place: expert by expert, codes
within the memory that they have, so that nothing needs room for two. Scales become a parameter of
their own, so that whatever moves experts between ranks moves them too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError, explain
from ...kernels.formats import FORMATS, Format
from ..host_checks import check_symbol
from ..host_symbols import FUSED_FUNCTION

if TYPE_CHECKING:
    import torch

_RUNNER = "marlin"
_SCALES = "packed_scales"
_CODES = ("weight_packed", "qweight")
_NAMES = ("w13", "w2")
_READ_ONCE = (
    "weight_scale", "weight_scale_inv", "scales", "qzeros", "weight_g_idx", "g_idx",
    "g_idx_sort_indices",
)  # fmt: skip
"""What nothing reads once weights are repacked."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ keeps a channel among the eight of a word."""


def codes_of(layer: Any, name: str) -> Any:
    """The parameter that holds the codes of w13 or w2; None where weights are not packed."""
    if _is_fp4(layer):
        return getattr(layer, f"{name}_weight")
    found = (getattr(layer, f"{name}_{suffix}", None) for suffix in _CODES)
    return next((codes for codes in found if codes is not None), None)


def stored_weights(layer: Any, name: str) -> Any:
    """The parameter that holds w13 or w2, packed or not."""
    codes = codes_of(layer, name)
    return getattr(layer, f"{name}_weight") if codes is None else codes


def packed_format(layer: Any) -> Format:
    """The format of a layer whose weights are packed, loaded or not.

    Raises:
        UnsupportedError: one that our kernels do not decode.
    """
    known: Format | None = getattr(layer, "_moe_plugin_format", None)
    if known is not None:
        return known
    scale, zero = _scale(layer, "w13"), _zero(layer, "w13")
    groups = scale.shape[2 if _in_bytes(codes_of(layer, "w13")) else 1]
    group = layer.hidden_size // groups
    code = "e2m1" if _is_fp4(layer) else "integer"
    found = code, _bits(layer), group, zero is not None
    more = _unread(layer)
    for fmt in FORMATS.values():
        same = (fmt.code, fmt.weight_bits, fmt.group_size, fmt.zero_points) == found
        if fmt.packed and same and not more:
            return fmt
    zeros = "" if zero is None else ", zero points"
    raise UnsupportedError(
        explain(
            f"MoE layer {layer.layer_id}: packed weights",
            got=f"{code}, {_bits(layer)} bits, groups of {group}{zeros}{more}",
            allowed=", ".join(fmt.name for fmt in FORMATS.values() if fmt.packed),
            fix="--use-batched-dp-moe off",
        )
    )


def let_host_build(backend: str) -> None:
    """Give the host's Marlin runner a function behind this all-to-all: without one it refuses to be
    built, and with it the layer. Our experts stand before it in every forward."""
    if check_symbol(FUSED_FUNCTION) is not None:
        return
    from sglang.srt.layers.moe.moe_runner.base import FusedOpPool

    if FusedOpPool.get_fused_func(backend, _RUNNER) is None:
        FusedOpPool.register_fused_func(backend, _RUNNER, refuse_rows)


def refuse_rows(dispatch_output: Any, *_: Any) -> Any:
    """The host's Marlin runner where our experts do not stand before it.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        explain(
            "experts of packed weights behind an all-to-all",
            got=type(dispatch_output).__name__,
            allowed="low-latency rows, which the plugin's experts take",
            fix="--use-batched-dp-moe off",
        )
    )


def keep_from_host(layer: Any) -> None:
    """Have the layer's method repack for our kernels where it would for the host's."""
    layer._moe_plugin_format = packed_format(layer)
    layer.quant_method.process_weights_after_loading = repack
    layer.quant_method.restore_weights_before_loading = restore


def repack(layer: Any) -> None:
    """Bring a loaded layer's weights into our order; a second call finds nothing to do."""
    import torch

    from ...kernels.packing import STRIP, pack_codes, pack_scales, packed_words, scale_words

    if _is_repacked(layer):
        return
    fmt = packed_format(layer)
    layer._moe_plugin_loaded = {
        name: (parameter.shape, parameter.dtype) for name, parameter in _loaded(layer)
    }
    # Weights that are loaded anew stay where captured graphs read them.
    before = vars(layer).pop("_moe_plugin_codes", {})
    sizes = {"w13": (2 * layer.intermediate_size_per_partition, layer.hidden_size)}
    sizes["w2"] = sizes["w13"][1], sizes["w13"][0] // 2
    for name, (rows, depth) in sizes.items():
        parameter, read = codes_of(layer, name), _reader(layer, name)
        experts, strips = parameter.shape[0], rows // STRIP
        words = parameter.data.view(torch.int32)
        whole = (experts, strips, packed_words(depth))
        ragged = words.numel() != prod(whole)  # a depth that is padded needs room of its own
        if name in before:
            place = before[name]
            if ragged:  # loaded at the beginning of what is written now
                parameter.data = parameter.data.clone()
        else:
            place = words.new_empty(whole) if ragged else words
        kept = getattr(layer, f"{name}_{_SCALES}", None)
        size = (experts, strips, scale_words(depth, fmt))
        scales = place.new_empty(size) if kept is None else kept.data
        for expert in range(experts):
            codes, scale, zero = read(expert)
            try:
                scales[expert] = pack_scales(scale, depth, fmt, zero)
            except ValueError as error:
                where = f"MoE layer {layer.layer_id}: {name}"
                raise UnsupportedError(f"{where}: {error}: --use-batched-dp-moe off") from error
            place.view(experts, -1)[expert] = pack_codes(codes, fmt).flatten()
        parameter.data = place.view(whole)
        setattr(layer, f"{name}_{_SCALES}", torch.nn.Parameter(scales, requires_grad=False))
    for name, parameter in _loaded(layer):
        if name.endswith(_READ_ONCE):
            parameter.data = parameter.data.new_empty(0)


def restore(layer: Any) -> None:
    """Give the layer's parameters the shapes in which the host loads them, codes in the memory that
    they have. Before the first `repack`, and a second time, there is nothing to do."""
    if not _is_repacked(layer):
        return
    layer._moe_plugin_codes = {name: codes_of(layer, name).data for name in _NAMES}
    for name, (shape, dtype) in layer._moe_plugin_loaded.items():
        parameter = getattr(layer, name)
        if name.endswith(_READ_ONCE):
            parameter.data = parameter.data.new_empty(shape)
        else:
            packed = parameter.data.flatten().view(dtype)
            parameter.data = packed[: shape.numel()].view(shape)


def packed_weights(layer: Any, name: str) -> tuple[Any, Any]:
    """Codes and scales of w13 or w2, as `ExpertWeights` takes them; no copy."""
    return codes_of(layer, name), getattr(layer, f"{name}_{_SCALES}")


def _is_fp4(layer: Any) -> bool:
    """Whether the experts are FP4, and are not turned into FP8 as they are loaded."""
    method = getattr(layer, "quant_method", None)
    fp4 = getattr(method, "is_fp4_expert", False)
    return bool(fp4) and not getattr(method, "dequant_fp4_to_fp8", False)


def _is_repacked(layer: Any) -> bool:
    return bool(_scale(layer, "w13").numel() == 0)


def _loaded(layer: Any) -> list[tuple[str, Any]]:
    """The parameters that `repack` reads or does away with, by name."""
    names = [f"{name}_{each}" for name in _NAMES for each in ("weight", *_CODES, *_READ_ONCE)]
    found = ((name, getattr(layer, name, None)) for name in names)
    return [(name, parameter) for name, parameter in found if parameter is not None]


def _in_bytes(codes: Any) -> bool:
    return bool(codes.dtype.itemsize == 1)


def _scale(layer: Any, name: str) -> Any:
    names = ("weight_scale", "weight_scale_inv", "scales")
    found = (getattr(layer, f"{name}_{suffix}", None) for suffix in names)
    return next(scale for scale in found if scale is not None)


def _zero(layer: Any, name: str) -> Any | None:
    if type(layer.quant_method).__name__ == "GPTQMarlinMoEMethod":
        return None  # has the parameter, and never reads it
    found = getattr(layer, f"{name}_qzeros", None)
    return None if found is None or found.numel() == 0 else found


def _quantisation(layer: Any) -> Any:
    scheme = getattr(layer, "scheme", None)
    return scheme if hasattr(scheme, "num_bits") else layer.quant_method.quant_config


def _bits(layer: Any) -> int:
    if _is_fp4(layer):
        return 4
    given = _quantisation(layer)
    return int(getattr(given, "num_bits", 0) or getattr(given, "weight_bits", 0))


def _unread(layer: Any) -> str:
    """What else a layer has that would be left out; empty where there is nothing."""
    given = _quantisation(layer)
    order = getattr(given, "actorder", None)
    if getattr(given, "desc_act", False) or getattr(order, "value", order) == "group":
        return ", ordered by activation"  # inputs of a group are not neighbours
    if getattr(layer, "w13_weight_zero_point", None) is not None:
        return ", zero points that the host's loader does not transpose"
    return ""


def _reader(layer: Any, name: str) -> Callable[[int], tuple[Any, Any, Any]]:
    """(codes [N, K], scales [N, groups], zero points or None) of one expert."""
    codes, scale, zero = codes_of(layer, name), _scale(layer, name), _zero(layer, name)
    if _is_fp4(layer):
        return partial(_read_fp4, codes, scale)
    if _in_bytes(codes):
        return partial(_read_bytes, codes, scale, zero)
    depth = layer.hidden_size if name == "w13" else layer.intermediate_size_per_partition
    return partial(_read_words, codes, scale, zero, codes.shape[1] == depth)


def _read_words(codes: Any, scale: Any, zero: Any, awq: bool, expert: int) -> tuple[Any, Any, Any]:
    order = _AWQ_ORDER if awq else tuple(range(8))
    packed = codes.data[expert]
    unpacked = _nibbles(packed, order) if awq else _nibbles(packed.T, order).T
    zeros = None if zero is None else _nibbles(zero.data[expert], order).T
    return unpacked.T, scale.data[expert].T, zeros


def _read_bytes(codes: Any, scale: Any, zero: Any, expert: int) -> tuple[Any, Any, Any]:
    unpacked = _nibbles(codes.data[expert], (0, 1))
    zeros = None if zero is None else _nibbles(zero.data[expert].T, (0, 1)).T
    return unpacked, scale.data[expert], zeros


def _read_fp4(codes: Any, scale: Any, expert: int) -> tuple[Any, Any, Any]:
    import torch

    bits = scale.data[expert].float().view(torch.int32)  # powers of two: exponents are all of them
    return _nibbles(codes.data[expert], (0, 1)), ((bits >> 23) & 255).to(torch.uint8), None


def _nibbles(packed: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """[rows, words] to [rows, codes]; `order`: which of a word's codes comes next."""
    import torch

    shifts = torch.tensor([4 * place for place in order], device=packed.device)
    return ((packed.unsqueeze(-1).to(torch.int32) >> shifts) & 15).flatten(-2).to(torch.uint8)
