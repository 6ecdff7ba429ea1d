"""The PTX that dequantises packed weights, run an instruction at a time on CPU."""

import re
from collections.abc import Callable

import pytest
import torch

from moe_plugin.kernels.formats import FORMATS, Format
from moe_plugin.kernels.packing import dequantise_packed_torch, pack_codes, pack_scales
from moe_plugin.kernels.sm90.dequantise import SCALES, WEIGHTS
from moe_plugin.kernels.sm90.gemm_kernel import experts_kernel
from tests.support.kernel_cases import quantise_codes

PACKED = {name: fmt for name, fmt in FORMATS.items() if fmt.packed}
ROWS, DEPTH = 32, 256
Registers = dict[str, torch.Tensor]


def bf16_pairs(word: torch.Tensor) -> torch.Tensor:
    """[..., 2] float32 of registers that hold two bf16 each."""
    halves = torch.stack([word & 0xFFFF, word >> 16], -1)
    return (halves << 16).to(torch.int32).view(torch.float32)


def word_of(pairs: torch.Tensor) -> torch.Tensor:
    """Registers of two values, rounded to bf16."""
    bits = pairs.bfloat16().view(torch.int16).long() & 0xFFFF
    return bits[..., 0] | bits[..., 1] << 16


def permuted(low: torch.Tensor, high: torch.Tensor, selector: torch.Tensor) -> torch.Tensor:
    """Four of eight bytes."""
    both = low | high << 32
    picked = [both >> 8 * (selector >> 4 * i & 7) & 0xFF for i in range(4)]
    return picked[0] | picked[1] << 8 | picked[2] << 16 | picked[3] << 24


def and_or(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Of all functions of three bits the one that is used."""
    assert (table == 0xEA).all()
    return a & b | c


OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "lop3.b32": and_or,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "prmt.b32": permuted,
    "sub.bf16x2": lambda a, b: word_of(bf16_pairs(a) - bf16_pairs(b)),
    "mul.bf16x2": lambda a, b: word_of(bf16_pairs(a) * bf16_pairs(b)),
}


def run_ptx(text: str, given: Registers) -> Registers:
    """Every register afterwards, as unsigned values in int64."""
    registers = dict(given)
    some = next(iter(given.values()))

    def value(name: str) -> torch.Tensor:
        return torch.full_like(some, int(name, 0)) if name[0].isdigit() else registers[name]

    for line in text.strip().removeprefix("{").removesuffix("}").split(";"):
        operation, _, rest = line.strip().partition(" ")
        names = re.findall(r"[$\w]+", rest)
        if not operation or operation == ".reg":
            continue
        if rest.startswith("{"):  # a register's two halves
            low, high, source = names
            registers[low], registers[high] = value(source) & 0xFFFF, value(source) >> 16
        else:
            target, *operands = names
            registers[target] = OPERATIONS[operation](*map(value, operands)) & 0xFFFFFFFF
    return registers


def packed(fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Words and scales of random weights."""
    generator = torch.Generator().manual_seed(0)
    codes, scale, zero = quantise_codes(torch.randn(ROWS, DEPTH, generator=generator), fmt)
    return pack_codes(codes, fmt), pack_scales(scale, DEPTH, fmt, zero)


def words_of(words: torch.Tensor) -> torch.Tensor:
    """[strips, blocks of 64 inputs, 8 channels, 4 lanes, 4 words]"""
    return (words.long() & 0xFFFFFFFF).view(ROWS // 16, DEPTH // 64, 8, 4, 4)


def scales_of(fmt: Format, scales: torch.Tensor) -> list[torch.Tensor]:
    """Scales of channels g and g + 8 for every word, and zero points, as the kernel makes them."""
    scales = scales.long() & 0xFFFFFFFF
    within = max(1, 64 // fmt.group_size)
    if fmt.code == "e2m1":
        found = run_ptx(SCALES["e2m1"], {"$4": scales.reshape(ROWS // 16, -1, 8)})
        each = [torch.stack([found["$0"], found["$2"]], -1)]
        each.append(torch.stack([found["$1"], found["$3"]], -1))
    else:
        pairs = scales.reshape(ROWS // 16, -1, 8, within, 2 if fmt.zero_points else 1)
        each = []
        for kind in pairs.unbind(-1):
            found = run_ptx(SCALES["bf16"], {"$2": kind})
            each += [found["$0"], found["$1"]]
    # [strips, runs of blocks, 8, groups within a block] to every word
    blocks = DEPTH // 64

    def spread(values: torch.Tensor) -> torch.Tensor:
        values = values.repeat_interleave(blocks // values.shape[1], 1)
        return values.repeat_interleave(4 // within, -1)[:, :, :, None].expand(-1, -1, -1, 4, -1)

    return [spread(values) for values in each]


def weights_of(halves: list[torch.Tensor]) -> torch.Tensor:
    """[N, K] of the eight results of every word."""
    parts = torch.stack(halves, -1).unflatten(-1, (2, 2, 2))  # j, h, p
    strip, block, g, t, s, j, h, p = range(8)
    return parts.permute(strip, h, g, block, s, j, t, p).reshape(ROWS, DEPTH)


@pytest.mark.parametrize("fmt", PACKED.values(), ids=PACKED)
def test_weights_are_the_exact_ones_rounded_once(fmt: Format) -> None:
    words, scales = packed(fmt)
    how = "e2m1" if fmt.code == "e2m1" else "zero" if fmt.zero_points else "middle"
    given = [words_of(words), *scales_of(fmt, scales)]
    found = run_ptx(WEIGHTS[how], {f"${8 + i}": each for i, each in enumerate(given)})
    halves = [(found[f"${i}"] << 16).to(torch.int32).view(torch.float32) for i in range(8)]
    wanted = dequantise_packed_torch(words, scales, DEPTH, fmt).bfloat16().float()
    assert torch.equal(weights_of(halves), wanted)


@pytest.mark.parametrize("name", ["int4_g128", "int4_g128_zero"])
def test_codes_are_128_above(name: str) -> None:
    """What scaled sums start from: scale * (sum((128 + code) x) - (128 + zero) sum(x))."""
    fmt = FORMATS[name]
    words, scales = packed(fmt)
    found = run_ptx(WEIGHTS["codes"], {"$4": words_of(words)})
    pairs = [bf16_pairs(found[f"${i}"]) for i in range(4)]
    codes = weights_of([pair[..., p] for pair in pairs for p in range(2)]).double()
    x = torch.randn(DEPTH, 8, dtype=torch.float64)
    pairs = (scales.long() & 0xFFFFFFFF).view(ROWS // 16, DEPTH // 128, 8, -1)
    factors = bf16_pairs(pairs).double()  # strip, group, g, scale and zero, h
    factors = factors.permute(3, 0, 4, 2, 1).reshape(pairs.shape[-1], ROWS, DEPTH // 128, 1)
    zero = factors[1] if fmt.zero_points else 136.0
    sums = torch.einsum("ngk,gkm->ngm", codes.unflatten(1, (-1, 128)), x.unflatten(0, (-1, 128)))
    found_sums = (factors[0] * (sums - zero * x.unflatten(0, (-1, 128)).sum(1))).sum(1)
    wanted = dequantise_packed_torch(words, scales, DEPTH, fmt).double() @ x
    assert torch.allclose(found_sums, wanted, rtol=1e-9, atol=1e-9)


def test_other_text_is_another_kernel_to_tritons_cache() -> None:
    """Else a kernel compiled before an upgrade would read weights that are packed otherwise."""
    assert experts_kernel.cache_key
    constants = [getattr(v, "value", None) for v, _ in experts_kernel.used_global_vals.values()]
    assert WEIGHTS in constants
    assert SCALES in constants
