"""4-bit weights as the host's methods hold them, read by output channels, written by experts.

With K inputs and N output channels of w13 or w2; eight codes to an int32, lowest first:

    compressed-tensors   weight_packed [L, K/8, N], weight_scale [L, K/group, N], symmetric
    GPTQ                 qweight and scales the same; its Marlin method knows symmetric ones alone
    AWQ                  qweight [L, K, N/8] in AWQ's own order of eight, scales, qzeros alike
    moe_wna16            qweight [L, N, K/2] and qzeros [L, N/2, K/group] in bytes, scales
                         [L, N, K/group]
    FP4 (DeepSeek-V4)    weight [L, N, K/2] in bytes, weight_scale_inv [L, N, K/32], powers of two
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError, explain
from ...kernels.formats import FORMATS, Format
from ...planning.leaving import LEAVE_TEXT

if TYPE_CHECKING:
    import torch

_CODES = ("weight_packed", "qweight")
_SPENT = (
    "weight_scale", "weight_scale_inv", "scales", "qzeros", "weight_g_idx", "g_idx",
    "g_idx_sort_indices",
)  # fmt: skip
"""What nothing reads once weights are repacked."""
_BYTES = (0, 1)
_WORDS = tuple(range(8))
_AWQ_WORDS = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where a byte or a word keeps each of its codes."""


@dataclass(frozen=True, slots=True)
class HostLayout:
    """The parameters of w13 or w2, in the shapes in which the host loads them.

    Attributes:
        codes: the parameter that packs them, in bytes or int32.
        scale: its scales; of FP4 powers of two.
        zero: its zero points; None without, and where nothing reads them.
        places: where a byte or a word keeps each of its codes.
        packed_dim: the dimension, of one expert's codes, along which they are packed.
        packed_zeros: the same of its zero points.
        inputs_first: an expert is [K, N] here, not [N, K].
        exponents: the scales are read as exponent bytes.
    """

    codes: Any
    scale: Any
    zero: Any
    places: tuple[int, ...]
    packed_dim: int
    packed_zeros: int
    inputs_first: bool
    exponents: bool

    def read(
        self, expert: int, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(codes uint8 [N, K], scales [N, groups] as `pack_scales` takes them, zero points alike or
        None) of some output channels of one expert, whole strips; codes and zero points are
        copies."""
        codes = self._rows(self.codes.data[expert], rows, self.packed_dim)
        codes = _unpack(codes, self.packed_dim, self.places)
        zero = None
        if self.zero is not None:
            zeros = self._rows(self.zero.data[expert], rows, self.packed_zeros)
            zero = self._turned(_unpack(zeros, self.packed_zeros, self.places))
        return self._turned(codes), self.read_scale(expert)[rows], zero

    def read_scale(self, expert: int) -> torch.Tensor:
        """Scales of one expert, [N, groups]; of FP4 their exponents, uint8."""
        import torch

        scale = self.scale.data[expert]
        if self.exponents:
            return ((scale.float().view(torch.int32) >> 23) & 255).to(torch.uint8)
        return self._turned(scale)

    def stored(self, codes: Any, scale: Any, zero: Any) -> tuple[Any, Any, Any]:
        """Of int32 codes [N, K] and what `unpack_scales` makes of the rest: as the host stores
        these output channels."""
        packed = _pack(self._turned(codes), self.packed_dim, self.places).view(self.codes.dtype)
        zeros = None
        if self.zero is not None:
            zeros = _pack(self._turned(zero.int()), self.packed_zeros, self.places)
        return packed, self._turned(scale), zeros

    def write(self, expert: int, parts: list[tuple[Any, Any, Any]]) -> None:
        """Put back one expert, all of its output channels as `stored` gives them."""
        import torch

        parameters = self.codes, self.scale, self.zero
        found = [(p, each) for p, each in zip(parameters, zip(*parts, strict=True), strict=True)]
        # What takes memory comes before what is written.
        whole = [(p, torch.cat(each, self._channels)) for p, each in found if p is not None]
        for parameter, values in whole:
            parameter.data[expert] = values

    @property
    def _channels(self) -> int:
        """The dimension of one expert's tensors that is its output channels."""
        return 1 if self.inputs_first else 0

    def _rows(self, values: torch.Tensor, rows: slice, packed: int) -> torch.Tensor:
        each = len(self.places) if packed == self._channels else 1
        start, stop = rows.start // each, rows.stop // each
        return values.narrow(self._channels, start, stop - start)

    def _turned(self, values: torch.Tensor) -> torch.Tensor:
        return values.T if self.inputs_first else values


def host_layout(layer: Any, name: str) -> HostLayout:
    """How the layer holds w13 or w2, as it is loaded and not repacked."""
    codes, scale, zero = stored_codes(layer, name), scale_parameter(layer, name), _zero(layer, name)
    depth = layer.hidden_size if name == "w13" else layer.intermediate_size_per_partition
    if _in_bytes(codes):
        return HostLayout(codes, scale, zero, _BYTES, 1, 0, False, _is_fp4(layer))
    if codes.shape[1] == depth:
        return HostLayout(codes, scale, zero, _AWQ_WORDS, 1, 1, True, False)
    return HostLayout(codes, scale, zero, _WORDS, 0, 1, True, False)


def stored_codes(layer: Any, name: str) -> Any:
    """The parameter that holds the codes of w13 or w2, repacked or not; None where weights are not
    packed."""
    if _is_fp4(layer):
        return getattr(layer, f"{name}_weight")
    found = (getattr(layer, f"{name}_{suffix}", None) for suffix in _CODES)
    return next((codes for codes in found if codes is not None), None)


def stored_weights(layer: Any, name: str) -> Any:
    """The parameter that holds w13 or w2, packed or not."""
    codes = stored_codes(layer, name)
    return getattr(layer, f"{name}_weight") if codes is None else codes


def scale_parameter(layer: Any, name: str) -> Any:
    """The parameter that the host loads scales of w13 or w2 into."""
    names = ("weight_scale", "weight_scale_inv", "scales")
    found = (getattr(layer, f"{name}_{suffix}", None) for suffix in names)
    return next(scale for scale in found if scale is not None)


def spent_parameters(layer: Any, name: str) -> dict[str, Any]:
    """The parameters of w13 or w2 that nothing reads once its weights are repacked, by name."""
    found = ((f"{name}_{each}", getattr(layer, f"{name}_{each}", None)) for each in _SPENT)
    return {each: parameter for each, parameter in found if parameter is not None}


def read_format(layer: Any) -> Format:
    """The format of a layer whose weights are packed, and are not repacked; they may still be
    placeholders.

    Raises:
        UnsupportedError: one that our kernels do not decode.
    """
    scale, zero = scale_parameter(layer, "w13"), _zero(layer, "w13")
    groups = scale.shape[2 if _in_bytes(stored_codes(layer, "w13")) else 1]
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
            fix=LEAVE_TEXT,
        )
    )


def _is_fp4(layer: Any) -> bool:
    """Whether the experts are FP4, and are not turned into FP8 as they are loaded."""
    method = getattr(layer, "quant_method", None)
    fp4 = getattr(method, "is_fp4_expert", False)
    return bool(fp4) and not getattr(method, "dequant_fp4_to_fp8", False)


def _in_bytes(codes: Any) -> bool:
    return bool(codes.dtype.itemsize == 1)


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


def _unpack(packed: torch.Tensor, dim: int, places: tuple[int, ...]) -> torch.Tensor:
    """The codes of two dimensions of bytes or words, uint8, unpacked along one of them."""
    import torch

    codes = packed.movedim(dim, -1).unsqueeze(-1).to(torch.int32) >> _shifts(packed, places)
    return (codes & 15).flatten(-2).to(torch.uint8).movedim(-1, dim)


def _pack(codes: torch.Tensor, dim: int, places: tuple[int, ...]) -> torch.Tensor:
    """Inverse of `_unpack` for int32 codes: bytes, or words where eight share one."""
    import torch

    codes = codes.movedim(dim, -1)
    codes = codes.reshape(*codes.shape[:-1], -1, len(places))
    packed = (codes << _shifts(codes, places)).sum(-1, dtype=torch.int32)
    return (packed.to(torch.uint8) if places == _BYTES else packed).movedim(-1, dim)


def _shifts(like: torch.Tensor, places: tuple[int, ...]) -> torch.Tensor:
    import torch

    return torch.tensor([4 * place for place in places], dtype=torch.int32, device=like.device)
