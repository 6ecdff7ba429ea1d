"""4-bit weights of the host's layers, brought into the order of our kernels when they are loaded,
and given back when the host loads again.

The host would repack them for its own kernels. Ours take its place: expert by expert, codes within
the memory that they have, so that nothing needs room for two. Scales become a parameter of their
own, so that what moves experts between ranks moves them too (models whose list of what moves is
another are refused with it: ``MOVES_BY_NAME``). While the host may load again,
from `restore` to `repack`, scales share that memory where the host's take as much, such as those of
symmetric int4 in bf16; a layer has others twice.

What is given back is what was loaded, so that the host may load as little of it as it likes; but
scales are the bf16 ones that kernels read, and what nothing reads (activation orders, the zero
points of symmetric GPTQ) is zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

from ...errors import UnsupportedError, explain
from ...kernels.formats import Format
from ...planning.leaving import LEAVE_TEXT
from .packed_layouts import (
    HostLayout,
    host_layout,
    read_format,
    scale_parameter,
    spent_parameters,
    stored_codes,
)

_STATE = "_moe_plugin_packing"
_SCALES = "packed_scales"
_NAMES = ("w13", "w2")
_CODES_AT_ONCE = 2**22
"""Of one expert. While they are turned each is an int32, several times."""


@dataclass(slots=True)
class _Packing:
    """What a layer remembers of its packed weights.

    Attributes:
        format: theirs.
        repacked: they are in our order; otherwise as the host loads them.
        codes: shape and dtype in which the host loads the codes of w13 and w2.
        spent: shapes in which it loads what nothing reads once they are repacked, by parameter.
        places: memory of the codes that captured graphs read, while any are as the host loads them.
        unpacked: experts of w13 and w2, from the first on, that are as the host loads them; all
            where it says nothing. What failed half-way goes on from here.
    """

    format: Format
    repacked: bool = False
    codes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    spent: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Any] = field(default_factory=dict)
    unpacked: dict[str, int] = field(default_factory=dict)


def take_over_loading(layer: Any) -> None:
    """Have the layer's method repack for our kernels where it would for the host's."""
    setattr(layer, _STATE, _Packing(read_format(layer)))
    layer.quant_method.process_weights_after_loading = repack
    layer.quant_method.restore_weights_before_loading = restore


def is_repacked(layer: Any) -> bool:
    """Whether any of the layer's experts is in our order, so that the host cannot load into it."""
    state: _Packing | None = getattr(layer, _STATE, None)
    if state is None:
        return False
    left = (state.unpacked[name] < len(place) for name, place in state.places.items())
    return state.repacked or any(left)


def packed_format(layer: Any) -> Format:
    """The format of a layer whose weights are packed, loaded or not, repacked or not.

    Raises:
        UnsupportedError: one that our kernels do not decode.
    """
    state: _Packing | None = getattr(layer, _STATE, None)
    return read_format(layer) if state is None else state.format


def codes_and_scales(layer: Any, name: str) -> tuple[Any, Any]:
    """Of w13 or w2, as `ExpertWeights` takes them; no copy.

    Raises:
        UnsupportedError: the host is loading, and codes are in its order.
    """
    state: _Packing = getattr(layer, _STATE)
    if not state.repacked:
        raise UnsupportedError(
            explain(
                f"MoE layer {layer.layer_id}: forward",
                got="one while weights are being updated",
                allowed="none until /end_weight_update, or the update from disk, has succeeded",
                fix="pause generation (/pause_generation) before a weight update begins",
            )
        )
    return stored_codes(layer, name), getattr(layer, f"{name}_{_SCALES}")


def repack(layer: Any) -> None:
    """Bring a loaded layer's weights into our order; a second call finds nothing to do.

    Raises:
        UnsupportedError: FP4 scales that our kernels do not multiply by. The layer is as it was.
    """
    state: _Packing = getattr(layer, _STATE)
    if state.repacked:
        return
    layouts = {name: host_layout(layer, name) for name in _NAMES}
    for name, layout in layouts.items():
        state.unpacked.setdefault(name, layout.codes.shape[0])
        _check_exponents(layer, name, layout, state.unpacked[name])
    for name, layout in layouts.items():
        _make_room(layer, name, layout, state)
    for name, layout in layouts.items():
        _repack(layer, name, layout, state)
    for name, layout in layouts.items():
        state.codes[name] = layout.codes.shape, layout.codes.dtype
        layout.codes.data = state.places[name]
        for each, parameter in spent_parameters(layer, name).items():
            state.spent[each] = parameter.shape
            parameter.data = parameter.data.new_empty(0)
    state.places, state.repacked = {}, True


def _make_room(layer: Any, name: str, layout: HostLayout, state: _Packing) -> None:
    """Memory of w13 or w2 in our order. What is loaded anew stays where captured graphs read it."""
    import torch

    from ...kernels.packing import STRIP, packed_words, scale_words

    rows, depth = _size(layer, name)
    experts, strips = layout.codes.shape[0], rows // STRIP
    if name not in state.places:
        whole = experts, strips, packed_words(depth)
        words = layout.codes.data.view(torch.int32)
        # A depth that is padded needs more room than it was loaded into.
        same = words.numel() == prod(whole)
        state.places[name] = words.view(whole) if same else words.new_empty(whole)
    if getattr(layer, f"{name}_{_SCALES}", None) is None:
        words = scale_words(depth, state.format)
        scales = state.places[name].new_empty((experts, strips, words))
        setattr(layer, f"{name}_{_SCALES}", torch.nn.Parameter(scales, requires_grad=False))


def _repack(layer: Any, name: str, layout: HostLayout, state: _Packing) -> None:
    """Bring the experts of w13 or w2 that are as the host loads them into our order."""
    import torch

    from ...kernels.packing import pack_codes, pack_scales

    place, kept = state.places[name], getattr(layer, f"{name}_{_SCALES}")
    rows, depth = _size(layer, name)
    # The last first: what is loaded anew lies at the beginning of what is written.
    for expert in reversed(range(state.unpacked[name])):
        codes, scales = [], []
        for channels in _parts(rows, depth):
            code, scale, zero = layout.read(expert, channels)
            codes.append(pack_codes(code, state.format))
            scales.append(pack_scales(scale, depth, state.format, zero))
        place[expert], kept.data[expert] = torch.cat(codes), torch.cat(scales)
        state.unpacked[name] = expert


def restore(layer: Any) -> None:
    """Give the layer back what the host loaded, codes in the memory that they have, so that it may
    load all of it or some. Before the first `repack`, and a second time, there is nothing to do;
    what failed for want of memory may be called again."""
    state: _Packing = getattr(layer, _STATE)
    if state.repacked:
        _give_back(layer, state)
    for name in state.places:
        _restore(layer, name, state)


def _give_back(layer: Any, state: _Packing) -> None:
    """Let the layer have the parameters that the host loads; what they hold is not theirs yet."""
    room = {
        each: _room(layer, name, parameter, state.spent[each])
        for name in _NAMES
        for each, parameter in spent_parameters(layer, name).items()
    }
    for each, data in room.items():  # nothing fails from here on
        getattr(layer, each).data = data
    for name in _NAMES:
        codes, (shape, dtype) = stored_codes(layer, name), state.codes[name]
        state.places[name], state.unpacked[name] = codes.data, 0
        codes.data = codes.data.flatten().view(dtype)[: shape.numel()].view(shape)
    state.repacked = False


def _room(layer: Any, name: str, parameter: Any, shape: Any) -> Any:
    """Memory of a parameter that the host loads, and that nothing has read since. Scales that take
    what ours do share theirs, as codes do."""
    kept = getattr(layer, f"{name}_{_SCALES}").data
    same = shape.numel() * parameter.itemsize == kept.nbytes
    if same and parameter is scale_parameter(layer, name):
        return kept.flatten().view(parameter.dtype).view(shape)
    return parameter.data.new_zeros(shape)


def _restore(layer: Any, name: str, state: _Packing) -> None:
    """Bring the experts of w13 or w2 that are in our order into the host's."""
    from ...kernels.packing import STRIP, unpack_codes, unpack_scales

    place, kept = state.places[name], getattr(layer, f"{name}_{_SCALES}")
    layout, (rows, depth) = host_layout(layer, name), _size(layer, name)
    for expert in range(state.unpacked[name], len(place)):  # codes move to the beginning
        parts = []
        for channels in _parts(rows, depth):
            strips = slice(channels.start // STRIP, channels.stop // STRIP)
            codes = unpack_codes(place[expert, strips], depth, state.format)
            scale, zero = unpack_scales(kept.data[expert, strips], depth, state.format)
            parts.append(layout.stored(codes, scale, zero))
        layout.write(expert, parts)
        state.unpacked[name] = expert + 1


def _parts(rows: int, depth: int) -> list[slice]:
    """Output channels of an expert that are turned at once, whole strips."""
    from ...kernels.packing import STRIP

    count = max(1, _CODES_AT_ONCE // depth // STRIP) * STRIP
    return [slice(start, min(start + count, rows)) for start in range(0, rows, count)]


def _size(layer: Any, name: str) -> tuple[int, int]:
    """Output channels and inputs of w13 or w2."""
    hidden, inter = layer.hidden_size, layer.intermediate_size_per_partition
    return (2 * inter, hidden) if name == "w13" else (hidden, inter)


def _check_exponents(layer: Any, name: str, layout: HostLayout, experts: int) -> None:
    """Of the first experts, which are as the host loads them."""
    import torch

    from ...kernels.packing import LARGEST_EXPONENT

    if not layout.exponents or not experts:
        return
    found = [layout.read_scale(expert).max() for expert in range(experts)]
    largest = int(torch.stack(found).max())
    if largest > LARGEST_EXPONENT:
        raise UnsupportedError(
            explain(
                f"MoE layer {layer.layer_id}: exponent of an FP4 scale of {name}",
                got=largest,
                allowed=f"0 to {LARGEST_EXPONENT}, which are weights up to 12",
                fix=LEAVE_TEXT,
            )
        )
