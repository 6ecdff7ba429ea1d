"""Warp-specialised masked GEMM for SM90, in Gluon.

One warp streams weights and activations through a ring of shared-memory stages and never stops
between tiles; the other warps multiply and write. Each program owns two weight tiles: the gate and
the up rows of the same channels (fused), or two neighbouring tiles (plain). Few rows: weights are
the wide operand (SWAP_AB), so that 8 rows cost 8. Many rows: rows are, so that a thread needs two
row scales instead of one per column; the rows of a tile can then be shared by two groups of warps
that never wait for each other (WARP_GROUPS), so that one multiplies while the other writes.
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

from .. import formats
from .epilogue import Variant, write_activation, write_products
from .packed import multiply_packed
from .packed_sums import multiply_packed_sums
from .ring import Job, Ring, Schedule, gdc_launch, gdc_wait, produce

SCALE_BLOCK = gl.constexpr(formats.SCALE_BLOCK)
STREAM_REGISTERS = gl.constexpr(40)
SECOND_REGISTERS = gl.constexpr(232)  # of the second warp group; the first has what is left


@gluon.jit
def _mma(w, x, acc, use_acc, SWAP_AB: gl.constexpr):
    if SWAP_AB:
        acc = warpgroup_mma(w, x.permute((1, 0)), acc, use_acc=use_acc, is_async=True)
    else:
        acc = warpgroup_mma(x, w.permute((1, 0)), acc, use_acc=use_acc, is_async=True)
    return acc


@gluon.jit
def _weight_rows(job, col, SECOND: gl.constexpr, MMA: gl.constexpr, W_AXIS: gl.constexpr):
    """The weight rows of BLOCK_N channels; the second tile of the last channels may lie past the
    weights, and is not stored."""
    channels = gl.arange(0, job.BLOCK_N, gl.SliceLayout(1 - W_AXIS, MMA))
    if job.UP_COLUMN > 0:
        channels = 2 * channels
    return gl.minimum(job.weight_row(col, SECOND) + channels, job.w_rows - 1)


@gluon.jit
def _block_scale(
    base, job, col, SECOND: gl.constexpr, ALIGNED: gl.constexpr, MMA: gl.constexpr,
    W_AXIS: gl.constexpr,
):  # fmt: skip
    """Pointer(s) to the scales of BLOCK_N channels of one expert: one if they share a 128-row
    block, else one per weight row."""
    if ALIGNED:
        row = gl.minimum(job.weight_row(col, SECOND), job.w_rows - 1)
        at = base + row // SCALE_BLOCK * job.scale_cols
    else:
        blocks = _weight_rows(job, col, SECOND, MMA, W_AXIS) // SCALE_BLOCK
        at = base + gl.expand_dims(blocks * job.scale_cols, 1 - W_AXIS)
    return at


@gluon.jit
def _promote(acc, part, s_w, s_x, variant, W_AXIS: gl.constexpr):
    """acc + part * scales, with one multiply-add per element where the weight scale is scalar, or
    is left to the end."""
    if variant.W_SCALE != "block":
        acc += part * gl.expand_dims(s_x, W_AXIS)
    elif variant.ALIGNED:
        acc += part * gl.expand_dims(s_x * s_w, W_AXIS)
    else:
        acc += part * s_w * gl.expand_dims(s_x, W_AXIS)
    return acc


@gluon.jit
def _multiply_fp8(
    ring, job, variant, stage, phase, w_scale, expert, col, WARP_GROUP: gl.constexpr,
    MMA: gl.constexpr, SHAPE: gl.constexpr,
):  # fmt: skip
    """Both tiles' products; every step of 128 (or 64) channels is scaled into float32 sums."""
    W_AXIS: gl.constexpr = 0 if variant.SWAP_AB else 1
    HEIGHT: gl.constexpr = SHAPE[1 - W_AXIS]
    # Two sums and two products of 64 registers each would spill.
    OVERLAP: gl.constexpr = SHAPE[0] * SHAPE[1] // (32 * gl.num_warps()) < 64
    acc0 = gl.zeros(SHAPE, gl.float32, MMA)
    acc1 = gl.zeros(SHAPE, gl.float32, MMA)
    zero = gl.zeros(SHAPE, gl.float32, MMA)
    if variant.W_SCALE == "block":
        base = w_scale + expert.to(gl.int64) * job.scale_rows * job.scale_cols
        scale0 = _block_scale(base, job, col, 0, variant.ALIGNED, MMA, W_AXIS)
        scale1 = _block_scale(base, job, col, 1, variant.ALIGNED, MMA, W_AXIS)
    for k in range(job.steps_k):
        s_w0 = 1.0
        s_w1 = 1.0
        if variant.W_SCALE == "block":
            s_w0 = gl.load(scale0 + k * job.BLOCK_K // SCALE_BLOCK)
            s_w1 = gl.load(scale1 + k * job.BLOCK_K // SCALE_BLOCK)
        mbarrier.wait(ring.full.index(stage), phase)
        x = ring.rows(stage, HEIGHT, WARP_GROUP)
        scales = ring.s.index(stage).slice(WARP_GROUP * HEIGHT, HEIGHT)
        s_x = scales.load(gl.SliceLayout(W_AXIS, MMA))
        part0 = _mma(ring.w0.index(stage), x, zero, False, variant.SWAP_AB)
        if OVERLAP:
            part1 = _mma(ring.w1.index(stage), x, zero, False, variant.SWAP_AB)
            part0 = warpgroup_mma_wait(1, deps=(part0,))
            acc0 = _promote(acc0, part0, s_w0, s_x, variant, W_AXIS)
        else:
            # Giving a stage back makes all warps meet: do it while a product runs. Behind the last
            # one the tensor cores would idle until the slowest warp has scaled.
            mbarrier.arrive(ring.empty.index(ring.before(stage)), pred=k > 0)
            part0 = warpgroup_mma_wait(0, deps=(part0,))
            acc0 = _promote(acc0, part0, s_w0, s_x, variant, W_AXIS)
            part1 = _mma(ring.w1.index(stage), x, zero, False, variant.SWAP_AB)
        part1 = warpgroup_mma_wait(0, deps=(part1,))
        if OVERLAP:
            # The scales have reached their registers: what is fetched next may overwrite them.
            mbarrier.arrive(ring.empty.index(stage))
        acc1 = _promote(acc1, part1, s_w1, s_x, variant, W_AXIS)
        stage, phase = ring.advance(stage, phase)
    if not OVERLAP:
        mbarrier.arrive(ring.empty.index(ring.before(stage)))
    return acc0, acc1, stage, phase


@gluon.jit
def _multiply_bf16(
    ring, job, stage, phase, WARP_GROUP: gl.constexpr, SWAP_AB: gl.constexpr,
    MMA: gl.constexpr, SHAPE: gl.constexpr,
):  # fmt: skip
    HEIGHT: gl.constexpr = SHAPE[1 if SWAP_AB else 0]
    acc0 = gl.zeros(SHAPE, gl.float32, MMA)
    acc1 = gl.zeros(SHAPE, gl.float32, MMA)
    for k in range(job.steps_k):
        mbarrier.wait(ring.full.index(stage), phase)
        x = ring.rows(stage, HEIGHT, WARP_GROUP)
        acc0 = _mma(ring.w0.index(stage), x, acc0, True, SWAP_AB)
        acc1 = _mma(ring.w1.index(stage), x, acc1, True, SWAP_AB)
        # These two stay in flight; the step before has finished with its stage.
        acc0, acc1 = warpgroup_mma_wait(2, deps=(acc0, acc1))
        mbarrier.arrive(ring.empty.index(ring.before(stage)), pred=k > 0)
        stage, phase = ring.advance(stage, phase)
    acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
    mbarrier.arrive(ring.empty.index(ring.before(stage)))
    return acc0, acc1, stage, phase


@gluon.jit
def _finish_sum(
    acc, job, variant, w_scale, w_bias, expert, col, SECOND: gl.constexpr, MMA: gl.constexpr,
    W_AXIS: gl.constexpr,
):  # fmt: skip
    """What a tile's channels have once: scale and bias."""
    if variant.W_SCALE == "tensor":
        acc *= gl.load(w_scale + expert)
    if variant.W_SCALE == "channel" or w_bias is not None:
        rows = _weight_rows(job, col, SECOND, MMA, W_AXIS)
        at = expert.to(gl.int64) * job.w_rows + rows
        if variant.W_SCALE == "channel":
            acc *= gl.expand_dims(gl.load(w_scale + at), 1 - W_AXIS)
        if w_bias is not None:
            acc += gl.expand_dims(gl.load(w_bias + at), 1 - W_AXIS)
    return acc


@gluon.constexpr_function
def _mma_layout(shape, warps, bits):
    wide = min(shape[0] // 16, warps)
    across = warps // wide
    return gl.NVMMADistributedLayout([3, 0], [wide, across], [16, shape[1] // across, 256 // bits])


@gluon.jit
def _finish_tile(
    ring, job, variant, schedule, tile, stage, phase, w_scale, w_bias, out, out_scale,
    BLOCK_M: gl.constexpr, WARP_GROUP: gl.constexpr,
):  # fmt: skip
    """Multiply this group's share of one tile of BLOCK_M rows and write it."""
    W_AXIS: gl.constexpr = 0 if variant.SWAP_AB else 1
    HEIGHT: gl.constexpr = BLOCK_M // ring.WARP_GROUPS
    SHAPE: gl.constexpr = [job.BLOCK_N, HEIGHT] if variant.SWAP_AB else [HEIGHT, job.BLOCK_N]
    MMA: gl.constexpr = _mma_layout(SHAPE, gl.num_warps(), 8 if ring.FP8 else 16)
    expert, n, row, rows = schedule.locate(tile)
    row += WARP_GROUP * HEIGHT
    col = n * job.STEP
    if ring.FP8:
        acc0, acc1, stage, phase = _multiply_fp8(
            ring, job, variant, stage, phase, w_scale, expert, col, WARP_GROUP, MMA, SHAPE
        )
    elif ring.PACKED and job.SCALE_SUMS:
        acc0, acc1, stage, phase = multiply_packed_sums(ring, job, stage, phase, MMA, SHAPE)
    elif ring.PACKED:
        acc0, acc1, stage, phase = multiply_packed(ring, job, stage, phase, MMA, SHAPE)
    else:
        acc0, acc1, stage, phase = _multiply_bf16(
            ring, job, stage, phase, WARP_GROUP, variant.SWAP_AB, MMA, SHAPE
        )
    acc0 = _finish_sum(acc0, job, variant, w_scale, w_bias, expert, col, 0, MMA, W_AXIS)
    acc1 = _finish_sum(acc1, job, variant, w_scale, w_bias, expert, col, 1, MMA, W_AXIS)
    if variant.FUSED:
        write_activation(
            acc0, acc1, job, variant, out, out_scale, expert, n, row, rows, ring.FP8, MMA, W_AXIS
        )
    else:
        write_products(acc0, acc1, job, out, expert, n, row, rows, W_AXIS)
    return stage, phase


@gluon.jit
def _consume(
    ring, job, variant, counts_ptr, w_scale, w_bias, out, out_scale, WARP_GROUP: gl.constexpr
):  # fmt: skip
    """Multiply and write every tile of this program."""
    schedule = Schedule.create(counts_ptr, job, gl.num_warps())
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), schedule.total, gl.num_programs(0)):
        # Two equal paths would be merged behind their last product, which then waits too early.
        if job.BLOCK_M_BUSY > job.BLOCK_M:
            _expert, _n, _row, rows = schedule.locate(tile)
            if rows > job.BLOCK_M:
                stage, phase = _finish_tile(
                    ring, job, variant, schedule, tile, stage, phase, w_scale, w_bias, out,
                    out_scale, job.BLOCK_M_BUSY, WARP_GROUP,
                )  # fmt: skip
            else:
                stage, phase = _finish_tile(
                    ring, job, variant, schedule, tile, stage, phase, w_scale, w_bias, out,
                    out_scale, job.BLOCK_M, WARP_GROUP,
                )  # fmt: skip
        else:
            stage, phase = _finish_tile(
                ring, job, variant, schedule, tile, stage, phase, w_scale, w_bias, out, out_scale,
                job.BLOCK_M_BUSY, WARP_GROUP,
            )  # fmt: skip


@gluon.jit(
    do_not_specialize=["experts", "tiles_n", "w_rows", "steps_k", "scale_rows", "scale_cols"]
)
def experts_kernel(
    w_desc, x_desc, busy_desc, s_desc, w_scale, w_bias, counts_ptr, out, out_scale,
    experts, capacity, tiles_n, w_rows, steps_k, scale_rows, scale_cols, width,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_M_BUSY: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, LANES: gl.constexpr,
    BURST: gl.constexpr, WARP_GROUPS: gl.constexpr, FP8: gl.constexpr, SWAP_AB: gl.constexpr,
    FUSED: gl.constexpr, W_SCALE: gl.constexpr, ALIGNED: gl.constexpr, CHAINED: gl.constexpr,
    ALPHA: gl.constexpr, BETA: gl.constexpr, LIMIT: gl.constexpr, CLAMPED: gl.constexpr,
    UP_COLUMN: gl.constexpr, STRIP: gl.constexpr, W_COLUMNS: gl.constexpr,
    S_COLUMNS: gl.constexpr, GROUP: gl.constexpr, DEQUANTISE: gl.constexpr,
    SCALE_SUMS: gl.constexpr,
):  # fmt: skip
    """One launch over all live tiles; see the module docstring."""
    ring = Ring.create(w_desc, busy_desc, s_desc, STAGES, WARP_GROUPS, FP8, GROUP > 0)
    variant = Variant(SWAP_AB, FUSED, W_SCALE, ALIGNED, ALPHA, BETA, LIMIT, CLAMPED)
    # As `Problem.geometry` has it. The second tile: the up rows follow all gate rows, or take turns
    # with them; or the next tile.
    second = gl.to_tensor(BLOCK_N)
    step: gl.constexpr = BLOCK_N if FUSED else 2 * BLOCK_N
    if UP_COLUMN > 0:
        second = gl.to_tensor(0)
    elif FUSED:
        second = width
    job = Job(
        experts, capacity, tiles_n, w_rows, second, steps_k, scale_rows, scale_cols, width, step,
        BLOCK_N, BLOCK_M, BLOCK_M_BUSY, BLOCK_K, LANES, BURST, UP_COLUMN, STRIP, W_COLUMNS,
        S_COLUMNS, GROUP, DEQUANTISE, SCALE_SUMS,
    )  # fmt: skip
    if FUSED:
        # Counts and rows come from the launch before; what does not depend on it is done by now.
        gdc_wait()
        gdc_launch()
    # Arguments are spelled out each time: constants in a tuple with a name become run-time values.
    if WARP_GROUPS == 1:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (ring, job, variant, counts_ptr, w_scale, w_bias, out, out_scale,
                     gl.constexpr(0)),
                ),
                (produce, (ring, job, w_desc, x_desc, busy_desc, s_desc, counts_ptr, CHAINED)),
            ],
            [1],
            [STREAM_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (ring, job, variant, counts_ptr, w_scale, w_bias, out, out_scale,
                     gl.constexpr(0)),
                ),
                (
                    _consume,
                    (ring, job, variant, counts_ptr, w_scale, w_bias, out, out_scale,
                     gl.constexpr(1)),
                ),
                (produce, (ring, job, w_desc, x_desc, busy_desc, s_desc, counts_ptr, CHAINED)),
            ],
            [gl.num_warps(), 1],
            [SECOND_REGISTERS, STREAM_REGISTERS],
        )  # fmt: skip
