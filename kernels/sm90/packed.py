"""The SM90 product of weights that are dequantised in registers, `wgmma`'s first operand.

A lane's 16 bytes of a strip (`packing`) become the 32 values that four instructions want of it: of
each two weights one mask and one shift, a subtraction that is exact, and the multiplication by
their scale, which rounds to bf16 as dequantising does. `packed_sums` scales sums of a group in
float32 instead, which pays in groups of 128 with few rows.
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
from . import dequantise

STRIP = gl.constexpr(packing.STRIP)
# Triton's cache knows a kernel by its source and its constants, but not by those of another module.
WEIGHTS = gl.constexpr(dequantise.WEIGHTS)
WEIGHTS_TAKE = gl.constexpr(dequantise.WEIGHTS_TAKE)
SCALES = gl.constexpr(dequantise.SCALES)
SCALES_TAKE = gl.constexpr(dequantise.SCALES_TAKE)


@gluon.constexpr_function
def _text(texts, how):
    return texts[how]


@gluon.constexpr_function
def _powers(count, unit):
    """Bases of `count` steps of `unit` along the columns."""
    return [[0, unit << i] for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def _code_layout(shape, warps):
    """A lane's 16 bytes in one load; of several blocks of 64 inputs one load each."""
    strips = [[1 << i, 0] for i in range(shape[0].bit_length() - 1)]
    mine = warps.bit_length() - 1
    registers = [[0, 1], [0, 2], *_powers(shape[1] // 128, 128), *strips[mine:]]
    return gl.DistributedLinearLayout(registers, _powers(32, 4), strips[:mine], [], shape)


@gluon.constexpr_function
def _scale_layout(shape, warps, each):
    """Four lanes of the same channels read the same `each` words; then the next eight channels."""
    strips = [[1 << i, 0] for i in range(shape[0].bit_length() - 1)]
    mine = warps.bit_length() - 1
    registers = [*_powers(each, 1), *_powers(shape[1] // (8 * each), 8 * each), *strips[mine:]]
    lanes = [[0, 0], [0, 0], *_powers(8, each)]
    return gl.DistributedLinearLayout(registers, lanes, strips[:mine], [], shape)


@gluon.jit
def _spread(values, LIKE: gl.constexpr):
    """[strips, A, 8, C] to every word that these scales are of: [strips, A, B, 8, 4, C, D]."""
    PLACE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, gl.SliceLayout(6, LIKE)))
    values = gl.convert_layout(values, PLACE, assert_trivial=True)
    return gl.expand_dims(gl.expand_dims(gl.expand_dims(values, 2), 4), 6)


@gluon.jit
def _both(pairs, LIKE: gl.constexpr):
    """Words of two bf16 as one word of each, twice, to every word of weights that they are of."""
    g, h = gl.inline_asm_elementwise(
        _text(SCALES, "bf16"), _text(SCALES_TAKE, "bf16"), [pairs], dtype=(gl.int32,) * 2,
        is_pure=True, pack=1,
    )  # fmt: skip
    return _spread(g, LIKE), _spread(h, LIKE)


@gluon.jit
def load_packed(codes, scales, job):
    """One tile as it is stored, from shared memory."""
    # EACH: neighbouring words with the scales of two channels for 64 inputs, and zero points.
    EACH: gl.constexpr = (
        1
        if job.DEQUANTISE == "e2m1"
        else (max(1, 64 // job.GROUP) * (2 if job.DEQUANTISE == "zero" else 1))
    )
    q = codes.load(_code_layout(codes.shape, gl.num_warps()))
    s = scales.load(_scale_layout(scales.shape, gl.num_warps(), EACH))
    return q, s


@gluon.jit
def _operand(v, STRIPS: gl.constexpr, BLOCKS: gl.constexpr, MMA: gl.constexpr):
    """The eight bf16 of every word [strips, a, b, g, t, c, d] as [16 x strips, inputs]."""
    near = gl.join(gl.join(v[0], v[1]), gl.join(v[2], v[3]))
    far = gl.join(gl.join(v[4], v[5]), gl.join(v[6], v[7]))
    # strip, a, b, g, t, c, d, p, h, j: channels strip, h, g, and inputs a, b, c, d, j, t, p
    tile = gl.join(near, far).permute((0, 8, 3, 1, 2, 5, 6, 9, 4, 7))
    tile = tile.reshape(STRIP * STRIPS, 64 * BLOCKS)
    return gl.convert_layout(tile, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def unpack(q):
    """Every word as four words of two bf16, 128 + code, in the order of `dequantise`."""
    q = q.reshape(q.shape[0], 1, q.shape[1] // 128, 8, 4, 1, 4)
    return gl.inline_asm_elementwise(
        _text(WEIGHTS, "codes"), _text(WEIGHTS_TAKE, "codes"), [q], dtype=(gl.int32,) * 4,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _halves(pair):
    """Two bf16 of one register."""
    low = pair.to(gl.int16).to(gl.bfloat16, bitcast=True)
    high = (pair >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    return low, high


@gluon.jit
def operand_of(c, MMA: gl.constexpr):
    """What `unpack` gave of one tile as a first operand."""
    a, b = _halves(c[0])
    d, e = _halves(c[1])
    f, g = _halves(c[2])
    h, i = _halves(c[3])
    return _operand((a, b, d, e, f, g, h, i), c[0].shape[0], c[0].shape[2], MMA)


@gluon.jit
def _dequantise(q, s, job, MMA: gl.constexpr):
    """One tile, [16 x strips, inputs] in bf16, in the registers of a first operand."""
    STRIPS: gl.constexpr = q.shape[0]
    BLOCKS: gl.constexpr = q.shape[1] // 128
    # C: scale groups within a block of 64 inputs.
    # A: runs of blocks that share their scales, so that the tile has A x C groups.
    C: gl.constexpr = max(1, 64 // job.GROUP)
    A: gl.constexpr = BLOCKS if job.GROUP <= 64 else BLOCKS * 64 // job.GROUP
    q = q.reshape(STRIPS, A, BLOCKS // A, 8, 4, C, 4 // C)
    if job.DEQUANTISE == "zero":
        s, z = s.reshape(STRIPS, A, 8, C, 2).split()
        s0, s1 = _both(s, q.type.layout)
        z0, z1 = _both(z, q.type.layout)
        operands = [q, s0, s1, z0, z1]
    elif job.DEQUANTISE == "e2m1":
        s = gl.inline_asm_elementwise(
            _text(SCALES, "e2m1"), _text(SCALES_TAKE, "e2m1"), [s.reshape(STRIPS, A, 8)],
            dtype=(gl.int32,) * 4, is_pure=True, pack=1,
        )  # fmt: skip
        s0 = _spread(gl.join(s[0], s[2]), q.type.layout)
        s1 = _spread(gl.join(s[1], s[3]), q.type.layout)
        operands = [q, s0, s1]
    else:
        s0, s1 = _both(s.reshape(STRIPS, A, 8, C), q.type.layout)
        operands = [q, s0, s1]
    v = gl.inline_asm_elementwise(
        _text(WEIGHTS, job.DEQUANTISE), _text(WEIGHTS_TAKE, job.DEQUANTISE), operands,
        dtype=(gl.bfloat16,) * 8, is_pure=True, pack=1,
    )  # fmt: skip
    return _operand(v, STRIPS, BLOCKS, MMA)


@gluon.jit
def _multiply_ahead(ring, job, stage, phase, MMA: gl.constexpr, SHAPE: gl.constexpr):
    """A step's first tile is read from shared memory in the step before. The assembler moves
    nothing across the wait for its stage, so that either tile is dequantised while the tensor cores
    work on the other."""
    acc0 = gl.zeros(SHAPE, gl.float32, MMA)
    acc1 = gl.zeros(SHAPE, gl.float32, MMA)
    mbarrier.wait(ring.full.index(stage), phase)
    q0, s0 = load_packed(ring.w0.index(stage), ring.v0.index(stage), job)
    for k in range(job.steps_k):
        x = ring.rows(stage, SHAPE[1]).permute((1, 0))
        w = _dequantise(q0, s0, job, MMA)
        acc0 = warpgroup_mma(w, x, acc0, is_async=True)
        acc0, acc1 = warpgroup_mma_wait(1, deps=(acc0, acc1))
        # The products of the step before are done with its rows.
        mbarrier.arrive(ring.empty.index(ring.before(stage)), pred=k > 0)
        now = stage
        stage, phase = ring.advance(stage, phase)
        # Behind the last step nothing is waited for, and what is read not used.
        mbarrier.wait(ring.full.index(stage), phase, pred=k + 1 < job.steps_k)
        q1, s1 = load_packed(ring.w1.index(now), ring.v1.index(now), job)
        q0, s0 = load_packed(ring.w0.index(stage), ring.v0.index(stage), job)
        w = _dequantise(q1, s1, job, MMA)
        acc1 = warpgroup_mma(w, x, acc1, is_async=True)
        acc0, acc1 = warpgroup_mma_wait(1, deps=(acc0, acc1))
    return acc0, acc1, stage, phase


@gluon.jit
def _multiply_in_step(ring, job, stage, phase, MMA: gl.constexpr, SHAPE: gl.constexpr):
    """Both tiles are read when their step begins."""
    acc0 = gl.zeros(SHAPE, gl.float32, MMA)
    acc1 = gl.zeros(SHAPE, gl.float32, MMA)
    for k in range(job.steps_k):
        mbarrier.wait(ring.full.index(stage), phase)
        x = ring.rows(stage, SHAPE[1]).permute((1, 0))
        q0, s0 = load_packed(ring.w0.index(stage), ring.v0.index(stage), job)
        q1, s1 = load_packed(ring.w1.index(stage), ring.v1.index(stage), job)
        w = _dequantise(q0, s0, job, MMA)
        acc0 = warpgroup_mma(w, x, acc0, is_async=True)
        acc0, acc1 = warpgroup_mma_wait(1, deps=(acc0, acc1))
        # The products of the step before are done with its rows.
        mbarrier.arrive(ring.empty.index(ring.before(stage)), pred=k > 0)
        w = _dequantise(q1, s1, job, MMA)
        acc1 = warpgroup_mma(w, x, acc1, is_async=True)
        acc0, acc1 = warpgroup_mma_wait(1, deps=(acc0, acc1))
        stage, phase = ring.advance(stage, phase)
    return acc0, acc1, stage, phase


@gluon.jit
def multiply_packed(ring, job, stage, phase, MMA: gl.constexpr, SHAPE: gl.constexpr):
    """Both tiles' products. A wait stands before each: its registers are those of the product
    before last. Reading ahead takes 4 % off int4 at 8 rows, and would add 3 to 5 % to MXFP4."""
    if job.DEQUANTISE == "e2m1":
        acc0, acc1, stage, phase = _multiply_in_step(ring, job, stage, phase, MMA, SHAPE)
    else:
        acc0, acc1, stage, phase = _multiply_ahead(ring, job, stage, phase, MMA, SHAPE)
    acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
    mbarrier.arrive(ring.empty.index(ring.before(stage)))
    return acc0, acc1, stage, phase
