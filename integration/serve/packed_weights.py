"""4-bit weights of the host's layers, brought into the order of our kernels when they are loaded,
and given back when the host loads again.

The host would repack them for its own kernels. Ours take its place: expert by expert, codes within
the memory that they have, so that nothing needs room for two. Scales become a parameter of their
own, so that whatever moves experts between ranks moves them too. While the host may load again,
from `restore` to `repack`, a layer has its scales twice.

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
from .packed_layouts import HostLayout, host_layout, read_format, spent_parameters, stored_codes

_STATE = "_moe_plugin_packing"
_SCALES = "packed_scales"
_NAMES = ("w13", "w2")


@dataclass(slots=True)
class _Packing:
    """What a layer remembers of its packed weights.

    Attributes:
        format: theirs.
        repacked: they are in our order; otherwise as the host loads them.
        codes: shape and dtype in which the host loads the codes of w13 and w2.
        spent: shapes in which it loads what nothing reads once they are repacked, by parameter.
        places: memory of the codes that captured graphs read, while the host loads into it.
    """

    format: Format
    repacked: bool = False
    codes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    spent: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Any] = field(default_factory=dict)


def take_over_loading(layer: Any) -> None:
    """Have the layer's method repack for our kernels where it would for the host's."""
    setattr(layer, _STATE, _Packing(read_format(layer)))
    layer.quant_method.process_weights_after_loading = repack
    layer.quant_method.restore_weights_before_loading = restore


def packed_format(layer: Any) -> Format:
    """The format of a layer whose weights are packed, loaded or not, repacked or not.

    Raises:
        UnsupportedError: one that our kernels do not decode.
    """
    state: _Packing | None = getattr(layer, _STATE, None)
    return read_format(layer) if state is None else state.format


def codes_and_scales(layer: Any, name: str) -> tuple[Any, Any]:
    """Of w13 or w2, as `ExpertWeights` takes them; no copy."""
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
        _check_exponents(layer, name, layout)
    places = {name: _repack(layer, name, layout, state) for name, layout in layouts.items()}
    for name, layout in layouts.items():
        state.codes[name] = layout.codes.shape, layout.codes.dtype
        layout.codes.data = places[name]
        for each, parameter in spent_parameters(layer, name).items():
            state.spent[each] = parameter.shape
            parameter.data = parameter.data.new_empty(0)
    state.places, state.repacked = {}, True


def _repack(layer: Any, name: str, layout: HostLayout, state: _Packing) -> Any:
    """Write w13 or w2 in our order, and return where the codes are."""
    import torch

    from ...kernels.packing import STRIP, pack_codes, pack_scales, packed_words, scale_words

    rows, depth = _size(layer, name)
    experts, strips = layout.codes.shape[0], rows // STRIP
    whole = experts, strips, packed_words(depth)
    place = state.places.get(name)  # what is loaded anew stays where captured graphs read it
    if place is None:
        words = layout.codes.data.view(torch.int32)
        # A depth that is padded needs more room than it was loaded into.
        place = words.view(whole) if words.numel() == prod(whole) else words.new_empty(whole)
    kept = getattr(layer, f"{name}_{_SCALES}", None)
    if kept is None:
        scales = place.new_empty((experts, strips, scale_words(depth, state.format)))
        kept = torch.nn.Parameter(scales, requires_grad=False)
        setattr(layer, f"{name}_{_SCALES}", kept)
    # The last first: what is loaded anew lies at the beginning of what is written.
    for expert in reversed(range(experts)):
        codes, scale, zero = layout.read(expert)
        kept.data[expert] = pack_scales(scale, depth, state.format, zero)
        place[expert] = pack_codes(codes, state.format)
    return place


def restore(layer: Any) -> None:
    """Give the layer back what the host loaded, codes in the memory that they have, so that it may
    load all of it or some. Before the first `repack`, and a second time, there is nothing to do."""
    from ...kernels.packing import unpack_codes, unpack_scales

    state: _Packing = getattr(layer, _STATE)
    if not state.repacked:
        return
    for name in _NAMES:
        for each, parameter in spent_parameters(layer, name).items():
            parameter.data = parameter.data.new_zeros(state.spent[each])
    for name in _NAMES:
        parameter, kept = codes_and_scales(layer, name)
        place = state.places[name] = parameter.data
        shape, dtype = state.codes[name]
        parameter.data = place.flatten().view(dtype)[: shape.numel()].view(shape)
        layout, (_, depth) = host_layout(layer, name), _size(layer, name)
        for expert, words in enumerate(place):  # the first first: codes move to the beginning
            scale, zero = unpack_scales(kept.data[expert], depth, state.format)
            layout.write(expert, unpack_codes(words, depth, state.format), scale, zero)
    state.repacked = False


def _size(layer: Any, name: str) -> tuple[int, int]:
    """Output channels and inputs of w13 or w2."""
    hidden, inter = layer.hidden_size, layer.intermediate_size_per_partition
    return (2 * inter, hidden) if name == "w13" else (hidden, inter)


def _check_exponents(layer: Any, name: str, layout: HostLayout) -> None:
    import torch

    from ...kernels.packing import LARGEST_EXPONENT

    if not layout.exponents:
        return
    experts = range(layout.scale.shape[0])
    largest = int(torch.stack([layout.read_scale(expert).max() for expert in experts]).max())
    if largest > LARGEST_EXPONENT:
        raise UnsupportedError(
            explain(
                f"MoE layer {layer.layer_id}: exponent of an FP4 scale of {name}",
                got=largest,
                allowed=f"0 to {LARGEST_EXPONENT}, which are weights up to 12",
                fix=LEAVE_TEXT,
            )
        )
