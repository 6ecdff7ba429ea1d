"""The product of packed integers whose scales are applied to sums, in float32.

What `wgmma` is given of a code is 128 + code, which a mask and a shift make: nothing is subtracted
and nothing multiplied before a whole group's inputs are summed. One more product, with weights of
one, is the sum of the inputs, and takes 128 and the zero point off again:

    acc += scale * (sum((128 + code) * x) - (128 + zero) * sum(x))

Codes and their differences are exact, so that scales are not rounded onto weights. What is lost is
lost in the difference: sums in float32 are up to 136 / 4.6 times as large as what is left of them
where all inputs have one sign, which costs 5 of their 23 bits, and bf16 has 8. It pays with few
rows: a sum is scaled once per row and group, a weight once.
"""

# mypy: ignore-errors
# Device code: the types are the compiler's, not Python's.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import packing
from .packed import STRIP, load_packed, operand_of, unpack

MIDDLE = gl.constexpr(128.0 + packing.MIDDLE)


@gluon.jit
def _rows_of(pairs, MMA: gl.constexpr):
    """[strips, 8] words of two bf16, of channels g and g + 8, as float32 [16 x strips, 1]."""
    near = (pairs << 16).to(gl.float32, bitcast=True)
    far = (pairs & -65536).to(gl.float32, bitcast=True)
    rows = gl.join(near, far).permute((0, 2, 1)).reshape(STRIP * pairs.shape[0])
    return gl.expand_dims(gl.convert_layout(rows, gl.SliceLayout(1, MMA), assert_trivial=True), 1)


@gluon.jit
def _factors(s, job, MMA: gl.constexpr):
    """Scales, and what is to be taken off a code, of a tile's channels for one group."""
    if job.DEQUANTISE == "zero":
        s, z = s.reshape(s.shape[0], 8, 2).split()
        zero = _rows_of(z, MMA)
    else:
        s = s.reshape(s.shape[0], 8)
        zero = MIDDLE
    return _rows_of(s, MMA), zero


@gluon.jit
def _ones(job, ROWS: gl.constexpr, OPERAND: gl.constexpr):
    """Ones that the compiler does not know as such, and the same four registers for every
    instruction: it would move constants to new ones in every step."""
    row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, OPERAND)), 1)
    column = gl.expand_dims(gl.arange(0, job.BLOCK_K, gl.SliceLayout(0, OPERAND)), 0)
    return gl.where(row + (column & 15) + job.experts > 0, 1.0, 0.0).to(gl.bfloat16)


@gluon.jit
def multiply_packed_sums(ring, job, stage, phase, MMA: gl.constexpr, SHAPE: gl.constexpr):
    """Both tiles' products, a step being one group. The second tile's codes are unpacked while the
    tensor cores work on the first one's, and the first tile's of the next step while they work on
    the second one's. The assembler keeps that order across branches only: the wait for the next
    step's stage stands between the first tile's products and the second one's codes."""
    gl.static_assert(job.GROUP == job.BLOCK_K)
    acc0 = gl.zeros(SHAPE, gl.float32, MMA)
    acc1 = gl.zeros(SHAPE, gl.float32, MMA)
    part0 = gl.zeros(SHAPE, gl.float32, MMA)
    part1 = gl.zeros(SHAPE, gl.float32, MMA)
    total = gl.zeros(SHAPE, gl.float32, MMA)
    ones = _ones(job, SHAPE[0], gl.DotOperandLayout(0, MMA, 2))
    scale1 = gl.zeros([SHAPE[0], 1], gl.float32, MMA)
    zero1 = MIDDLE
    if job.DEQUANTISE == "zero":
        zero1 = gl.zeros([SHAPE[0], 1], gl.float32, MMA)
    never = job.experts < 0  # where a constant starts sums anew, they change registers on the way
    mbarrier.wait(ring.full.index(stage), phase)
    q0, s0 = load_packed(ring.w0.index(stage), ring.v0.index(stage), job)
    c0 = unpack(q0)
    scale0, zero0 = _factors(s0, job, MMA)
    for k in range(job.steps_k):
        x = ring.rows(stage, SHAPE[1]).permute((1, 0))
        part1 = warpgroup_mma_wait(0, deps=(part1,))
        mbarrier.arrive(ring.empty.index(ring.before(stage)), pred=k > 0)
        acc1 += scale1 * (part1 - zero1 * total)
        total = warpgroup_mma(ones, x, total, use_acc=never, is_async=True)
        part0 = warpgroup_mma(operand_of(c0, MMA), x, part0, use_acc=never, is_async=True)
        now = stage
        stage, phase = ring.advance(stage, phase)
        # Behind the last step nothing is waited for, and what is read not used.
        mbarrier.wait(ring.full.index(stage), phase, pred=k + 1 < job.steps_k)
        q1, s1 = load_packed(ring.w1.index(now), ring.v1.index(now), job)
        q0, s0 = load_packed(ring.w0.index(stage), ring.v0.index(stage), job)
        scale1, zero1 = _factors(s1, job, MMA)
        part1 = warpgroup_mma(operand_of(unpack(q1), MMA), x, part1, use_acc=never, is_async=True)
        total, part0, part1 = warpgroup_mma_wait(1, deps=(total, part0, part1))
        acc0 += scale0 * (part0 - zero0 * total)
        scale0, zero0 = _factors(s0, job, MMA)
        c0 = unpack(q0)
    part1 = warpgroup_mma_wait(0, deps=(part1,))
    mbarrier.arrive(ring.empty.index(ring.before(stage)))
    acc1 += scale1 * (part1 - zero1 * total)
    return acc0, acc1, stage, phase
