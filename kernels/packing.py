"""The order of 4-bit weights: that of the registers in which `wgmma` wants its first operand.

A strip is 16 output channels. Its weights lie side by side over the whole depth, 64 inputs at a
time: 32 lanes of 16 bytes. Lane `4 g + t` holds channels g and g + 8; of each 16 inputs its one
32-bit word has the four that the instruction gives to that lane, 2t, 2t + 1, 2t + 8 and 2t + 9, of
both channels. Neighbouring inputs are 16 bits apart, so that a shift and a mask turn a word into
two bf16 at a time; the bits of a code lie where that takes fewest of them (`PLACES`).

    weights   int32 [..., N / 16, K' / 64 * 128]; word [kb, g, t, s] holds channels g + 8 h and
              inputs 64 kb + 16 s + 8 j + 2 t + p: bit b is at PLACES[h + 2 j][b] + 16 p
    scales    int32 [..., N / 16, K' / group * 8 * (2 with zero points)]; two bf16, of channels g
              (low half) and g + 8; zero points after them, as 128 + z
    of MXFP4  int32 [..., N / 16, K' / 64 * 8]; exponent bytes of channels g and g + 8, first of 32
              inputs, then of the next 32

K' is K rounded up to `PACKED_DEPTH`; what was added is finite, and meets inputs that are zero
because rows end before it. Integer codes are unsigned: a weight
is (code - zero) * scale, zero being 8 where the format stores none.
"""

import torch
from torch.nn.functional import pad

from .formats import Code, Format

STRIP = 16
"""Output channels that are stored together."""
PACKED_DEPTH = 128
"""The depth is stored in whole multiples of this many inputs."""
_BLOCK = 64  # inputs of a lane's 16 bytes
MIDDLE = 8
"""Zero point of formats that store none."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes without a sign, which is the fourth bit."""
LARGEST_EXPONENT = 128
"""Of MXFP4's scales, 2**(exponent - 127): kernels multiply by 2**126 and the scale at once."""
PLACES: dict[Code, tuple[tuple[int, ...], ...]] = {
    "integer": ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15)),
    # Exponent and mantissa together, as in bf16. Signs lie where all but one of the shifts go to
    # the left, which another pipe than that of the masks can do.
    "e2m1": ((6, 7, 8, 15), (3, 4, 5, 10), (0, 1, 2, 9), (12, 13, 14, 11)),
}
"""Where in a half word the bits of each pair's codes lie, the lowest first."""


def padded_depth(depth: int) -> int:
    """Inputs as they are stored."""
    return -(-depth // PACKED_DEPTH) * PACKED_DEPTH


def packed_words(depth: int) -> int:
    """int32 words of a strip's weights."""
    return 2 * padded_depth(depth)


def scale_words(depth: int, fmt: Format) -> int:
    """int32 words of a strip's scales and zero points."""
    return padded_depth(depth) // fmt.group_size * STRIP * fmt.scale_bytes // 4


def pack_codes(codes: torch.Tensor, fmt: Format) -> torch.Tensor:
    """[..., N, K] codes of 0 to 15, any integer dtype, to int32 [..., N / 16, packed_words]."""
    *outer, rows, depth = codes.shape
    whole = padded_depth(depth)
    nothing = MIDDLE if fmt.code == "integer" else 0
    codes = pad(codes.to(torch.int32), (0, whole - depth), value=nothing)
    codes = codes.view(*outer, rows // STRIP, 2, 8, whole // _BLOCK, 4, 2, 4, 2)
    # strip, h, g, kb, s, j, t, p -> the word's place, then the code's within
    at = len(outer)
    order = (0, 3, 2, 6, 4, 1, 5, 7)
    codes = codes.permute(*range(at), *(at + i for i in order))
    words = torch.zeros(codes.shape[:-3], dtype=torch.int32, device=codes.device)
    for pair, places in enumerate(PLACES[fmt.code]):
        for p in range(2):
            code = codes[..., pair % 2, pair // 2, p]
            for bit, count, place in _runs(places):
                words |= ((code >> bit) & ((1 << count) - 1)) << (place + 16 * p)
    return words.flatten(-4)


def _runs(places: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Neighbouring bits that stay neighbours: (first bit, how many, place of the first)."""
    starts = [b for b, place in enumerate(places) if b == 0 or place != places[b - 1] + 1]
    ends = [*starts[1:], len(places)]
    return [(b, end - b, places[b]) for b, end in zip(starts, ends, strict=True)]


def unpack_codes(words: torch.Tensor, depth: int, fmt: Format) -> torch.Tensor:
    """Inverse of `pack_codes`: int32 [..., N, K]."""
    *outer, strips, count = words.shape
    words = words.view(*outer, strips, count // (2 * _BLOCK), 8, 4, 4)
    codes = words.new_zeros(*words.shape, 2, 2, 2)
    for pair, places in enumerate(PLACES[fmt.code]):
        for p in range(2):
            code = codes[..., pair // 2, pair % 2, p]
            for bit, bits, place in _runs(places):
                code |= ((words >> (place + 16 * p)) & ((1 << bits) - 1)) << bit
    at = len(outer)
    order = (0, 6, 2, 1, 4, 5, 3, 7)  # of strip, kb, g, t, s, j, h, p
    codes = codes.permute(*range(at), *(at + i for i in order))
    return codes.reshape(*outer, strips * STRIP, count // 2)[..., :depth]


def pack_scales(
    scale: torch.Tensor, depth: int, fmt: Format, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """[..., N, ceil(K / group)] scales, rounded to bf16, and integer zero points of the same shape
    where the format has them, to int32 [..., N / 16, scale_words]; of MXFP4 its exponent bytes,
    uint8.

    Raises:
        ValueError: an exponent of MXFP4 above `LARGEST_EXPONENT`.
    """
    if fmt.code == "e2m1":
        if scale.numel() and int(scale.max()) > LARGEST_EXPONENT:
            raise ValueError(
                f"exponent of an MXFP4 scale: got {int(scale.max())}, allowed 0 to "
                f"{LARGEST_EXPONENT}, weights up to 12. Fix: run the host's own experts"
            )
        return _across(scale, depth, fmt, 0).flatten(-3).view(torch.int32).flatten(-2)
    pairs = [_across(scale.to(torch.bfloat16), depth, fmt, 0.0)]
    if zero is not None:
        pairs.append(_across((zero.to(torch.int32) + 128).to(torch.bfloat16), depth, fmt, 128.0))
    words = [pair.view(torch.int32).squeeze(-1) for pair in pairs]
    return torch.stack(words, -1).flatten(-4)


def _across(values: torch.Tensor, depth: int, fmt: Format, beyond: float) -> torch.Tensor:
    """[..., strips, groups of 64 inputs or more down, 8, groups within, channels g and g + 8]."""
    *outer, rows, groups = values.shape
    whole = padded_depth(depth) // fmt.group_size
    within = max(1, _BLOCK // fmt.group_size)
    values = pad(values, (0, whole - groups), value=beyond)
    values = values.view(*outer, rows // STRIP, 2, 8, whole // within, within)
    return values.movedim(-4, -1).transpose(-4, -3).contiguous()


def unpack_scales(
    words: torch.Tensor, depth: int, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inverse of `pack_scales`: float32 [..., N, ceil(K / group)], of MXFP4 powers of two, and zero
    points of the same shape and dtype or None."""
    *outer, strips, _count = words.shape
    each = 2 if fmt.zero_points else 1
    within = max(1, _BLOCK // fmt.group_size)
    values = words.view(torch.uint8 if fmt.code == "e2m1" else torch.bfloat16)
    values = values.view(*outer, strips, -1, 8, within, each, 2)
    values = values.movedim(-1, -5).transpose(-4, -3)  # strip, h, g, block, within, each
    values = values.reshape(*outer, strips * STRIP, -1, each)[..., : -(-depth // fmt.group_size), :]
    if fmt.code == "e2m1":
        exponents = values[..., 0].to(torch.int32)
        # As bits, so that no device rounds; 2**-127 is subnormal in float32.
        return (exponents << 23).clamp_min(1 << 22).view(torch.float32), None
    return values[..., 0].float(), (values[..., 1].float() - 128 if fmt.zero_points else None)


def dequantise_packed_torch(
    words: torch.Tensor, scales: torch.Tensor, depth: int, fmt: Format
) -> torch.Tensor:
    """[..., N, K] in float32, exact: codes less zero points, times scales."""
    scale, zero = unpack_scales(scales, depth, fmt)
    codes = unpack_codes(words, depth, fmt)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(fmt.group_size, -1)[..., :depth]

    if fmt.code == "e2m1":
        # `E2M1` without its table, which would come from the CPU while a graph is captured.
        exponent, mantissa = codes >> 1 & 3, codes & 1
        values = torch.where(exponent > 0, (2 + mantissa << exponent) / 4, mantissa / 2)
        return torch.where(codes > 7, -values, values) * spread(scale)
    return (codes.float() - (MIDDLE if zero is None else spread(zero))) * spread(scale)
