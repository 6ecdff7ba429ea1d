"""The order of 4-bit weights, written down anew."""

import pytest
import torch

from moe_plugin.kernels.formats import FORMATS, INT4_G32, MXFP4, Format
from moe_plugin.kernels.packing import (
    E2M1,
    PLACES,
    dequantise_packed_torch,
    pack_codes,
    pack_scales,
    packed_words,
    scale_words,
    unpack_codes,
    unpack_scales,
)
from tests.support.kernel_cases import quantise_codes

PACKED = [fmt for fmt in FORMATS.values() if fmt.packed]
SIZES = pytest.mark.parametrize(("rows", "depth"), [(32, 128), (48, 176), (16, 384)])


@pytest.mark.parametrize("fmt", [INT4_G32, MXFP4], ids=str)
def test_every_code_lies_where_the_register_of_its_lane_is(fmt: Format) -> None:
    """Rows g and g + 8 of a strip, and of each 16 inputs 2t, 2t + 1, 2t + 8 and 2t + 9."""
    rows, depth = 32, 256
    codes = torch.randint(0, 16, (rows, depth))
    words = pack_codes(codes, fmt)
    for n in range(rows):
        for k in range(depth):
            lane = n % 8 * 4 + k % 8 // 2
            word = words[n // 16, k // 64 * 128 + lane * 4 + k % 64 // 16]
            places = PLACES[fmt.code][n % 16 // 8 + 2 * (k % 16 // 8)]
            bits = [int(word >> (place + 16 * (k % 2))) & 1 for place in places]
            assert sum(bit << i for i, bit in enumerate(bits)) == codes[n, k]


@SIZES
@pytest.mark.parametrize("fmt", PACKED, ids=str)
def test_packing_loses_nothing(fmt: Format, rows: int, depth: int) -> None:
    codes, scale, zero = quantise_codes(torch.randn(2, rows, depth), fmt)
    words, scales = pack_codes(codes, fmt), pack_scales(scale, depth, fmt, zero)
    assert words.shape == (2, rows // 16, packed_words(depth))
    assert scales.shape == (2, rows // 16, scale_words(depth, fmt))
    assert torch.equal(unpack_codes(words, depth, fmt), codes.int())
    unpacked, zeros = unpack_scales(scales, depth, fmt)
    factor = torch.exp2(scale.float() - 127) if fmt.code == "e2m1" else scale.float()
    assert torch.equal(unpacked, factor)
    assert zeros is None if zero is None else torch.equal(zeros, zero)
    whole = dequantise_packed_torch(words, scales, packed_words(depth) // 2, fmt)
    assert whole.isfinite().all()
    middle = 8 if zero is None else zero.repeat_interleave(fmt.group_size, -1)[..., :depth]
    values = codes.int() - middle
    if fmt.code == "e2m1":
        values = torch.tensor(E2M1)[codes.int() & 7] * (1 - 2 * (codes.int() >> 3))
    wanted = values * factor.repeat_interleave(fmt.group_size, -1)[..., :depth]
    assert torch.equal(whole[..., :depth], wanted)


def test_every_exponent_comes_back_as_its_power_of_two() -> None:
    """Also the one whose power is subnormal in float32."""
    exponents = torch.arange(128, dtype=torch.uint8).view(32, 4)
    powers, _ = unpack_scales(pack_scales(exponents, 128, MXFP4), 128, MXFP4)
    assert powers.flatten().tolist() == [2.0 ** (e - 127) for e in range(128)]


def test_a_scale_that_kernels_cannot_multiply_by_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exponent of an MXFP4 scale: got 129, allowed .*Fix: "):
        pack_scales(torch.full((16, 4), 129, dtype=torch.uint8), 128, MXFP4)
