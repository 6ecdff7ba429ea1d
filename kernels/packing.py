"""The order of 4-bit weights: that of the registers in which `wgmma` wants its first operand.

A strip is 16 output channels. Its weights lie side by side over the whole depth, 64 inputs at a
time: 32 lanes of 16 bytes. Lane `4 g + t` holds channels g and g + 8; of each 16 inputs its one
32-bit word has the four that the instruction gives to that lane, 2t, 2t + 1, 2t + 8 and 2t + 9, of
both channels. Neighbouring inputs are 16 bits apart, so that one mask and one shift turn a word
into two bf16 at a time.

    weights   int32 [..., N / 16, K' / 64 * 128]; word [kb, g, t, s], nibble h + 2 j + 4 p is
              channel g + 8 h, input 64 kb + 16 s + 8 j + 2 t + p
    scales    int32 [..., N / 16, K' / group * 8 * (2 with zero points)]; two bf16, of channels g
              (low half) and g + 8; zero points after them, as 128 + z

K' is K rounded up to `PACKED_DEPTH`; what was added has scale zero. Codes are unsigned: a weight is
(code - zero) * scale, zero being 8 where the format stores none.
"""

import torch
from torch.nn.functional import pad

from .formats import Format

STRIP = 16
"""Output channels that are stored together."""
PACKED_DEPTH = 128
"""The depth is stored in whole multiples of this many inputs."""
_BLOCK = 64  # inputs of a lane's 16 bytes
MIDDLE = 8
"""Zero point of formats that store none."""


def padded_depth(depth: int) -> int:
    """Inputs as they are stored."""
    return -(-depth // PACKED_DEPTH) * PACKED_DEPTH


def packed_words(depth: int) -> int:
    """int32 words of a strip's weights."""
    return 2 * padded_depth(depth)


def scale_words(depth: int, fmt: Format) -> int:
    """int32 words of a strip's scales and zero points."""
    return padded_depth(depth) // fmt.group * (STRIP // 2) * (2 if fmt.zero_points else 1)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """[..., N, K] codes of 0 to 15, any integer dtype, to int32 [..., N / 16, packed_words]."""
    *outer, rows, depth = codes.shape
    whole = padded_depth(depth)
    codes = pad(codes.to(torch.int32), (0, whole - depth), value=MIDDLE)
    codes = codes.view(*outer, rows // STRIP, 2, 8, whole // _BLOCK, 4, 2, 4, 2)
    # strip, h, g, kb, s, j, t, p -> the word's place, then its nibbles
    at = len(outer)
    order = (0, 3, 2, 6, 4, 1, 5, 7)
    codes = codes.permute(*range(at), *(at + i for i in order))
    words = torch.zeros(codes.shape[:-3], dtype=torch.int32, device=codes.device)
    for h in range(2):
        for j in range(2):
            for p in range(2):
                words |= codes[..., h, j, p] << (4 * (h + 2 * j + 4 * p))
    return words.flatten(-4)


def unpack_codes(words: torch.Tensor, depth: int) -> torch.Tensor:
    """Inverse of `pack_codes`: int32 [..., N, K]."""
    *outer, strips, count = words.shape
    words = words.view(*outer, strips, count // (2 * _BLOCK), 8, 4, 4)
    shifts = torch.arange(0, 32, 4, device=words.device, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & 15
    codes = codes.unflatten(-1, (2, 2, 2))  # p, j, h
    at = len(outer)
    order = (0, 7, 2, 1, 4, 6, 3, 5)  # of strip, kb, g, t, s, p, j, h
    codes = codes.permute(*range(at), *(at + i for i in order))
    return codes.reshape(*outer, strips * STRIP, count // 2)[..., :depth]


def pack_scales(
    scale: torch.Tensor, depth: int, fmt: Format, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """[..., N, ceil(K / group)] scales, rounded to bf16, and integer zero points of the same shape
    where the format has them, to int32 [..., N / 16, scale_words]."""
    pairs = [_pair(scale.to(torch.bfloat16), depth, fmt, 0.0)]
    if zero is not None:
        pairs.append(_pair((zero.to(torch.int32) + 128).to(torch.bfloat16), depth, fmt, 128.0))
    return torch.stack(pairs, -1).flatten(-4)


def _pair(values: torch.Tensor, depth: int, fmt: Format, beyond: float) -> torch.Tensor:
    """int32 [..., strips, groups of a block down, 8, groups within]."""
    *outer, rows, groups = values.shape
    whole = padded_depth(depth) // fmt.group
    within = max(1, _BLOCK // fmt.group)
    values = pad(values, (0, whole - groups), value=beyond)
    values = values.view(*outer, rows // STRIP, 2, 8, whole // within, within)
    values = values.movedim(-4, -1).transpose(-4, -3)  # strip, block, g, within, h
    return values.contiguous().view(torch.int32).squeeze(-1)


def unpack_scales(
    words: torch.Tensor, depth: int, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Inverse of `pack_scales`: float32 [..., N, ceil(K / group)], and zero points or None."""
    *outer, strips, _count = words.shape
    each = 2 if fmt.zero_points else 1
    within = max(1, _BLOCK // fmt.group)
    values = words.view(torch.bfloat16).view(*outer, strips, -1, 8, within, each, 2)
    values = values.movedim(-1, -5).transpose(-4, -3)  # strip, h, g, block, within, each
    values = values.reshape(*outer, strips * STRIP, -1, each)[..., : -(-depth // fmt.group), :]
    scale = values[..., 0].float()
    return scale, (values[..., 1].float() - 128 if fmt.zero_points else None)


def dequantise_packed_torch(
    words: torch.Tensor, scales: torch.Tensor, depth: int, fmt: Format
) -> torch.Tensor:
    """[..., N, K] in float32, exact: codes less zero points, times scales."""
    scale, zero = unpack_scales(scales, depth, fmt)
    codes = unpack_codes(words, depth).float()

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.repeat_interleave(fmt.group, -1)[..., :depth]

    return (codes - (MIDDLE if zero is None else spread(zero))) * spread(scale)
