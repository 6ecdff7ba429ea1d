"""The order of 4-bit weights, written down anew."""

import pytest
import torch

from moe_plugin.kernels.formats import FORMATS, Format
from moe_plugin.kernels.packing import (
    dequantise_packed_torch,
    pack_codes,
    pack_scales,
    packed_words,
    scale_words,
    unpack_codes,
    unpack_scales,
)
from tests.support.kernel_cases import quantise_int4

PACKED = [fmt for fmt in FORMATS.values() if fmt.packed]
SIZES = pytest.mark.parametrize(("rows", "depth"), [(32, 128), (48, 176), (16, 384)])


def test_every_code_lies_where_the_register_of_its_lane_is() -> None:
    """Rows g and g + 8 of a strip, and of each 16 inputs 2t, 2t + 1, 2t + 8 and 2t + 9."""
    rows, depth = 32, 256
    codes = torch.randint(0, 16, (rows, depth))
    words = pack_codes(codes)
    for n in range(rows):
        for k in range(depth):
            lane = n % 8 * 4 + k % 8 // 2
            word = words[n // 16, k // 64 * 128 + lane * 4 + k % 64 // 16]
            nibble = n % 16 // 8 + 2 * (k % 16 // 8) + 4 * (k % 2)
            assert (word >> (4 * nibble)) & 15 == codes[n, k]


@SIZES
@pytest.mark.parametrize("fmt", PACKED, ids=str)
def test_packing_loses_nothing_and_pads_with_nothing(fmt: Format, rows: int, depth: int) -> None:
    codes, scale, zero = quantise_int4(torch.randn(2, rows, depth), fmt)
    words, scales = pack_codes(codes), pack_scales(scale, depth, fmt, zero)
    assert words.shape == (2, rows // 16, packed_words(depth))
    assert scales.shape == (2, rows // 16, scale_words(depth, fmt))
    assert torch.equal(unpack_codes(words, depth), codes.int())
    unpacked, zeros = unpack_scales(scales, depth, fmt)
    assert torch.equal(unpacked, scale.float())
    assert zeros is None if zero is None else torch.equal(zeros, zero)
    whole = dequantise_packed_torch(words, scales, packed_words(depth) // 2, fmt)
    assert (whole[..., depth:] == 0).all()
    middle = 8 if zero is None else zero.repeat_interleave(fmt.group, -1)[..., :depth]
    wanted = (codes - middle) * scale.float().repeat_interleave(fmt.group, -1)[..., :depth]
    assert torch.equal(whole[..., :depth], wanted)
