"""Warp-specialised masked GEMM for SM90, in Gluon.

One warp streams weights and activations through a ring of shared-memory stages and never stops
between tiles; the other warps multiply and write. Each program owns two weight tiles: the gate and
the up rows of the same channels (fused), or two neighbouring tiles (plain).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

FP8_MAX = gl.constexpr(448.0)
MIN_AMAX = gl.constexpr(1e-10)
SCALE_BLOCK = gl.constexpr(128)


@gluon.aggregate
class Schedule:
    """Live tiles in expert order; within an expert the row tiles of one weight tile are adjacent,
    so that a second row tile finds its weights in L2."""

    counts: gl.tensor
    ends: gl.tensor
    lanes: gl.tensor
    tiles_n: gl.tensor
    total: gl.tensor
    BT: gl.constexpr

    @gluon.jit
    def create(
        counts_ptr, experts, tiles_n, BT: gl.constexpr, LP: gl.constexpr, WARPS: gl.constexpr
    ):
        layout: gl.constexpr = gl.BlockedLayout([LP // 32], [32], [WARPS], [0])
        lanes = gl.arange(0, LP, layout)
        counts = gl.load(counts_ptr + lanes, mask=lanes < experts, other=0)
        tiles = (counts + BT - 1) // BT * tiles_n
        ends = gl.associative_scan(tiles, 0, _add)
        return Schedule(counts, ends, lanes, tiles_n, gl.sum(tiles, 0), BT)

    @gluon.jit
    def locate(self, tile):
        passed = self.ends <= tile
        expert = gl.sum(passed.to(gl.int32), 0)
        first = gl.max(gl.where(passed, self.ends, 0), 0)
        rows = gl.sum(gl.where(self.lanes == expert, self.counts, 0), 0)
        row_tiles = (rows + self.BT - 1) // self.BT
        local = tile - first
        return expert, local // row_tiles, (local % row_tiles) * self.BT, rows


@gluon.jit
def _add(a, b):
    return a + b


@gluon.aggregate
class Ring:
    """Stages of (two weight tiles, activation tile, activation scales) and their barriers."""

    w0: gl.shared_memory_descriptor
    w1: gl.shared_memory_descriptor
    x: gl.shared_memory_descriptor
    s: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    FP8: gl.constexpr

    @gluon.jit
    def create(w_desc, x_desc, s_desc, STAGES: gl.constexpr, FP8: gl.constexpr):
        w0 = gl.allocate_shared_memory(
            w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout
        )
        w1 = gl.allocate_shared_memory(
            w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout
        )
        x = gl.allocate_shared_memory(
            x_desc.dtype, [STAGES] + x_desc.block_type.shape, x_desc.layout
        )
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=1)
        if FP8:
            s = gl.allocate_shared_memory(
                s_desc.dtype, [STAGES] + s_desc.block_type.shape, s_desc.layout
            )
        else:
            s = x
        return Ring(w0, w1, x, s, full, empty, STAGES, FP8)

    @gluon.jit
    def advance(self, stage, phase):
        stage += 1
        wrap = stage == self.STAGES
        return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)

    @gluon.jit
    def before(self, stage):
        return gl.where(stage == 0, self.STAGES - 1, stage - 1)


@gluon.jit
def _fetch_weights(ring, w_desc, x_desc, s_desc, stage, row0, row1, col):
    bar = ring.full.index(stage)
    if ring.FP8:
        mbarrier.expect(
            bar,
            2 * w_desc.block_type.nbytes + x_desc.block_type.nbytes + s_desc.block_type.nbytes,
        )
    else:
        mbarrier.expect(bar, 2 * w_desc.block_type.nbytes + x_desc.block_type.nbytes)
    tma.async_load(w_desc, [row0, col], bar, ring.w0.index(stage))
    tma.async_load(w_desc, [row1, col], bar, ring.w1.index(stage))


@gluon.jit
def _fetch_rows(ring, x_desc, s_desc, stage, row, col, scale_at):
    bar = ring.full.index(stage)
    tma.async_load(x_desc, [row, col], bar, ring.x.index(stage))
    if ring.FP8:
        tma.async_load(s_desc, [scale_at], bar, ring.s.index(stage))


@gluon.jit
def _produce(
    ring, w_desc, x_desc, s_desc, counts_ptr, experts, capacity, tiles_n, w_rows, step, second,
    steps_k, BT: gl.constexpr, BK: gl.constexpr, LP: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    schedule = Schedule.create(counts_ptr, experts, tiles_n, BT, LP, 1)
    programs = gl.num_programs(0)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    tile = gl.program_id(0)
    early = gl.to_tensor(0)
    if CHAINED:
        # The previous launch still computes the activations; the weights do not depend on it.
        early = gl.where(tile < schedule.total, gl.minimum(steps_k, ring.STAGES), 0)
        expert, n, row, _rows = schedule.locate(tile)
        row0 = expert * w_rows + n * step
        for k in range(early):
            _fetch_weights(ring, w_desc, x_desc, s_desc, k, row0, row0 + second, k * BK)
        _gdc_wait()
    while tile < schedule.total:
        expert, n, row, _rows = schedule.locate(tile)
        row0 = expert * w_rows + n * step
        x_row = expert * capacity + row
        scale_at = expert * steps_k * capacity + row
        for k in range(steps_k):
            if k >= early:
                mbarrier.wait(ring.empty.index(stage), phase)
                _fetch_weights(ring, w_desc, x_desc, s_desc, stage, row0, row0 + second, k * BK)
            _fetch_rows(ring, x_desc, s_desc, stage, x_row, k * BK, scale_at + k * capacity)
            stage, phase = ring.advance(stage, phase)
        early = gl.to_tensor(0)
        tile += programs


@gluon.jit
def _gdc_wait():
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _gdc_launch():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _block_scale(
    base, row, scale_cols, w_rows, BI: gl.constexpr, ALIGNED: gl.constexpr, MMA: gl.constexpr
):
    """Pointer(s) to the scales of weight rows [row, row + BI) of one expert: one if they share a
    128-row block, else one per row."""
    if ALIGNED:
        at = base + row // SCALE_BLOCK * scale_cols
    else:
        rows = gl.minimum(row + gl.arange(0, BI, gl.SliceLayout(1, MMA)), w_rows - 1)
        at = base + gl.expand_dims(rows // SCALE_BLOCK * scale_cols, 1)
    return at


@gluon.jit
def _promote(acc, part, s_w, s_x, ALIGNED: gl.constexpr):
    """acc + part * scales, with one multiply-add per element where the weight scale is scalar."""
    if ALIGNED:
        acc += part * gl.expand_dims(s_x * s_w, 0)
    else:
        acc += part * s_w * gl.expand_dims(s_x, 0)
    return acc


@gluon.jit
def _consume(
    ring, counts_ptr, w_scale, out, out_scale, experts, capacity, tiles_n, w_rows, step, second,
    steps_k, scale_rows, scale_cols, width,
    BI: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr, LP: gl.constexpr, FUSED: gl.constexpr,
    ALIGNED: gl.constexpr,
):  # fmt: skip
    WARPS: gl.constexpr = gl.num_warps()
    FP8: gl.constexpr = ring.FP8
    WIDE: gl.constexpr = BI // 16 if BI // 16 < WARPS else WARPS
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[WIDE, WARPS // WIDE],
        instr_shape=[16, BT // (WARPS // WIDE), 32 if FP8 else 16],
    )
    # Two sums and two products of 64 registers each would spill.
    OVERLAP: gl.constexpr = BI * BT // (32 * WARPS) < 64
    schedule = Schedule.create(counts_ptr, experts, tiles_n, BT, LP, WARPS)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for tile in range(gl.program_id(0), schedule.total, gl.num_programs(0)):
        expert, n, row, rows = schedule.locate(tile)
        col = n * step
        acc0 = gl.zeros([BI, BT], gl.float32, MMA)
        acc1 = gl.zeros([BI, BT], gl.float32, MMA)
        if FP8:
            base = w_scale + expert.to(gl.int64) * scale_rows * scale_cols
            scale0 = _block_scale(base, col, scale_cols, w_rows, BI, ALIGNED, MMA)
            scale1 = _block_scale(base, col + second, scale_cols, w_rows, BI, ALIGNED, MMA)
            zero = gl.zeros([BI, BT], gl.float32, MMA)
            for k in range(steps_k):
                s_w0 = gl.load(scale0 + k * BK // SCALE_BLOCK)
                s_w1 = gl.load(scale1 + k * BK // SCALE_BLOCK)
                mbarrier.wait(ring.full.index(stage), phase)
                x = ring.x.index(stage).permute((1, 0))
                s_x = ring.s.index(stage).slice(0, BT).load(gl.SliceLayout(0, MMA))
                part = warpgroup_mma(ring.w0.index(stage), x, zero, use_acc=False, is_async=True)
                if OVERLAP:
                    part1 = warpgroup_mma(
                        ring.w1.index(stage), x, zero, use_acc=False, is_async=True
                    )
                    part = warpgroup_mma_wait(1, deps=(part,))
                    acc0 = _promote(acc0, part, s_w0, s_x, ALIGNED)
                else:
                    part = warpgroup_mma_wait(0, deps=(part,))
                    acc0 = _promote(acc0, part, s_w0, s_x, ALIGNED)
                    part1 = warpgroup_mma(
                        ring.w1.index(stage), x, zero, use_acc=False, is_async=True
                    )
                part1 = warpgroup_mma_wait(0, deps=(part1,))
                fence_async_shared()
                mbarrier.arrive(ring.empty.index(stage))
                acc1 = _promote(acc1, part1, s_w1, s_x, ALIGNED)
                stage, phase = ring.advance(stage, phase)
        else:
            for k in range(steps_k):
                mbarrier.wait(ring.full.index(stage), phase)
                x = ring.x.index(stage).permute((1, 0))
                acc0 = warpgroup_mma(ring.w0.index(stage), x, acc0, is_async=True)
                acc1 = warpgroup_mma(ring.w1.index(stage), x, acc1, is_async=True)
                # These two stay in flight; the step before has finished with its stage.
                acc0, acc1 = warpgroup_mma_wait(2, deps=(acc0, acc1))
                mbarrier.arrive(ring.empty.index(ring.before(stage)), pred=k > 0)
                stage, phase = ring.advance(stage, phase)
            acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
            mbarrier.arrive(ring.empty.index(ring.before(stage)))
        if FUSED:
            act = acc0 / (1.0 + gl.exp(-acc0)) * acc1
            if FP8:
                channels = col + gl.arange(0, BI, gl.SliceLayout(1, MMA))
                act = gl.where(gl.expand_dims(channels < width, 1), act, 0.0)
                scale = gl.maximum(gl.max(gl.abs(act), axis=0), MIN_AMAX) / FP8_MAX
                act = act * gl.expand_dims(1.0 / scale, 0)
                at = row + gl.arange(0, BT, gl.SliceLayout(0, MMA))
                group = (expert.to(gl.int64) * tiles_n + n) * capacity
                gl.store(out_scale + group + at, scale, mask=at < rows)
            _store(act, out, expert, row, rows, col, capacity, width)
        else:
            _store(acc0, out, expert, row, rows, col, capacity, width)
            _store(acc1, out, expert, row, rows, col + second, capacity, width)


@gluon.jit
def _store(tile, out, expert, row, rows, col, capacity, width):
    """Write a [channels, rows] tile to row-major out[expert, row:, col:], live rows only."""
    BI: gl.constexpr = tile.shape[0]
    BT: gl.constexpr = tile.shape[1]
    VEC: gl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    ACROSS: gl.constexpr = BI // VEC if BI // VEC < 32 else 32
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [VEC, 1], [ACROSS, 32 // ACROSS], [1, gl.num_warps()], [0, 1]
    )
    tile = gl.convert_layout(tile.to(out.dtype.element_ty), LAYOUT)
    cols = col + gl.arange(0, BI, gl.SliceLayout(1, LAYOUT))
    at = row + gl.arange(0, BT, gl.SliceLayout(0, LAYOUT))
    base = out + expert.to(gl.int64) * capacity * width
    offsets = gl.expand_dims(cols, 1) + gl.expand_dims(at.to(gl.int64) * width, 0)
    mask = gl.expand_dims(cols < width, 1) & gl.expand_dims(at < rows, 0)
    gl.store(base + offsets, tile, mask=mask)


# Only divisibility that widens stores is worth a kernel of its own.
@gluon.jit(
    do_not_specialize=[
        "experts", "tiles_n", "w_rows", "step", "second", "steps_k", "scale_rows", "scale_cols"
    ]
)  # fmt: skip
def experts_kernel(
    w_desc, x_desc, s_desc, w_scale, counts_ptr, out, out_scale, experts, capacity, tiles_n,
    w_rows, step, second, steps_k, scale_rows, scale_cols, width,
    BI: gl.constexpr, BT: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, LP: gl.constexpr,
    FP8: gl.constexpr, FUSED: gl.constexpr, ALIGNED: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    if FUSED:
        _gdc_launch()
    ring = Ring.create(w_desc, x_desc, s_desc, STAGES, FP8)
    gl.warp_specialize(
        [
            (
                _consume,
                (ring, counts_ptr, w_scale, out, out_scale, experts, capacity, tiles_n, w_rows,
                 step, second, steps_k, scale_rows, scale_cols, width, BI, BT, BK, LP, FUSED,
                 ALIGNED),
            ),
            (
                _produce,
                (ring, w_desc, x_desc, s_desc, counts_ptr, experts, capacity, tiles_n, w_rows,
                 step, second, steps_k, BT, BK, LP, CHAINED),
            ),
        ],
        [1],
        [40],
    )  # fmt: skip
