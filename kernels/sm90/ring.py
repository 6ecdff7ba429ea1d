"""Device-side parts of the SM90 kernels that move data: schedule, shared-memory ring, producer."""

# mypy: ignore-errors
# Device code: the types are the compiler's, not Python's.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
def _add(a, b):
    return a + b


@gluon.aggregate
class Job:
    """Sizes of one launch. Weight tile `n` of an expert starts at row `n * STEP`, its second half
    `second` rows later. What stores need to be 16 bytes wide is a constant or specialised:
    capacity, width and STEP.

    Where gate and up rows take turns (UP_COLUMN > 0), two weight rows are described as one of twice
    the depth: the second tile's rows are the first one's, from column UP_COLUMN on. What the last
    step of a gate row reads beyond it belongs to the up row, and meets rows filled with zeros.

    Packed weights are described by strips of STRIP rows, a step by W_COLUMNS words and its scales,
    of GROUP inputs each (0: not packed), by S_COLUMNS."""

    experts: gl.tensor
    capacity: gl.tensor
    tiles_n: gl.tensor
    w_rows: gl.tensor
    second: gl.tensor
    steps_k: gl.tensor
    scale_rows: gl.tensor
    scale_cols: gl.tensor
    width: gl.tensor
    STEP: gl.constexpr
    BLOCK_N: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_M_BUSY: gl.constexpr
    BLOCK_K: gl.constexpr
    LANES: gl.constexpr
    BURST: gl.constexpr
    UP_COLUMN: gl.constexpr
    STRIP: gl.constexpr
    W_COLUMNS: gl.constexpr
    S_COLUMNS: gl.constexpr
    GROUP: gl.constexpr
    DEQUANTISE: gl.constexpr
    SCALE_SUMS: gl.constexpr

    @gluon.jit
    def first_rows(self, expert, n):
        """Of both tiles of weight tile `n`, as the weights are described to the copy engine."""
        per_expert = self.w_rows
        if self.UP_COLUMN > 0:
            per_expert = self.w_rows // 2
        row = expert * per_expert + n * self.STEP
        second = row + self.second
        if self.STRIP > 1:
            row = row // self.STRIP
            second = second // self.STRIP
        return row, second

    @gluon.jit
    def weight_row(self, channel, SECOND: gl.constexpr):
        """Among an expert's weight rows, that of a channel of the first or the second tile."""
        row = channel
        if self.UP_COLUMN > 0:
            row = 2 * channel + SECOND
        elif SECOND:
            row = channel + self.second
        return row


@gluon.aggregate
class Schedule:
    """Live tiles in expert order. Within an expert the row tiles of one weight tile are adjacent,
    so that a second row tile finds its weights in L2. Experts with more than BLOCK_M rows are cut
    into tiles of BLOCK_M_BUSY rows. A count outside [0, capacity] reads as the nearest inside."""

    counts: gl.tensor
    ends: gl.tensor
    lanes: gl.tensor
    total: gl.tensor
    BLOCK_M: gl.constexpr
    BLOCK_M_BUSY: gl.constexpr

    @gluon.jit
    def create(counts_ptr, job, WARPS: gl.constexpr):
        layout: gl.constexpr = gl.BlockedLayout([job.LANES // 32], [32], [WARPS], [0])
        lanes = gl.arange(0, job.LANES, layout)
        counts = gl.load(counts_ptr + lanes, mask=lanes < job.experts, other=0)
        counts = gl.minimum(gl.maximum(counts, 0), job.capacity)
        heights = gl.where(counts > job.BLOCK_M, job.BLOCK_M_BUSY, job.BLOCK_M)
        tiles = (counts + heights - 1) // heights * job.tiles_n
        ends = gl.associative_scan(tiles, 0, _add)
        return Schedule(counts, ends, lanes, gl.sum(tiles, 0), job.BLOCK_M, job.BLOCK_M_BUSY)

    @gluon.jit
    def locate(self, tile):
        """(expert, weight tile, first row, live rows)"""
        passed = self.ends <= tile
        expert = gl.sum(passed.to(gl.int32), 0)
        first = gl.max(gl.where(passed, self.ends, 0), 0)
        rows = gl.sum(gl.where(self.lanes == expert, self.counts, 0), 0)
        height = gl.where(rows > self.BLOCK_M, self.BLOCK_M_BUSY, self.BLOCK_M)
        row_tiles = (rows + height - 1) // height
        local = tile - first
        across = local // row_tiles
        row = (local - across * row_tiles) * height
        return expert, across, row, rows


@gluon.aggregate
class Ring:
    """Stages of (two weight tiles, activation tile, activation scales) and their barriers; packed
    weights have scales of their own, one tile each."""

    w0: gl.shared_memory_descriptor
    w1: gl.shared_memory_descriptor
    x: gl.shared_memory_descriptor
    s: gl.shared_memory_descriptor
    v0: gl.shared_memory_descriptor
    v1: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    WARP_GROUPS: gl.constexpr
    FP8: gl.constexpr
    PACKED: gl.constexpr

    @gluon.jit
    def create(
        w_desc, x_desc, s_desc, STAGES: gl.constexpr, WARP_GROUPS: gl.constexpr, FP8: gl.constexpr,
        PACKED: gl.constexpr,
    ):  # fmt: skip
        w_shape: gl.constexpr = [STAGES] + w_desc.block_type.shape  # noqa: RUF005
        x_shape: gl.constexpr = [STAGES] + x_desc.block_type.shape  # noqa: RUF005
        w0 = gl.allocate_shared_memory(w_desc.dtype, w_shape, w_desc.layout)
        w1 = gl.allocate_shared_memory(w_desc.dtype, w_shape, w_desc.layout)
        x = gl.allocate_shared_memory(x_desc.dtype, x_shape, x_desc.layout)
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(full.index(i), count=1)
            mbarrier.init(empty.index(i), count=WARP_GROUPS)
        if FP8:
            s_shape: gl.constexpr = [STAGES] + s_desc.block_type.shape  # noqa: RUF005
            s = gl.allocate_shared_memory(s_desc.dtype, s_shape, s_desc.layout)
        else:
            s = x
        if PACKED:
            v_shape: gl.constexpr = [STAGES] + s_desc.block_type.shape  # noqa: RUF005
            v0 = gl.allocate_shared_memory(s_desc.dtype, v_shape, s_desc.layout)
            v1 = gl.allocate_shared_memory(s_desc.dtype, v_shape, s_desc.layout)
        else:
            v0 = x
            v1 = x
        return Ring(w0, w1, x, s, v0, v1, full, empty, STAGES, WARP_GROUPS, FP8, PACKED)

    @gluon.jit
    def advance(self, stage, phase, STEP: gl.constexpr = 1):
        stage += STEP
        wrap = stage == self.STAGES
        return gl.where(wrap, 0, stage), gl.where(wrap, phase ^ 1, phase)

    @gluon.jit
    def before(self, stage):
        return gl.where(stage == 0, self.STAGES - 1, stage - 1)

    @gluon.jit
    def rows(self, stage, BLOCK_M: gl.constexpr, PART: gl.constexpr = 0):
        """The stage's activation tile, cut into parts of BLOCK_M rows."""
        FIT: gl.constexpr = self.x.shape[1] // BLOCK_M
        shape: gl.constexpr = [self.STAGES * FIT, BLOCK_M, self.x.shape[2]]
        return self.x._reinterpret(self.x.dtype, shape, self.x.layout).index(stage * FIT + PART)

    @gluon.jit
    def fetch_weights(self, w_desc, x_desc, s_desc, job, stage, phase, row0, row1, step):
        """Both weight tiles of BURST steps, once their stages are free. The parts of a weight row
        that follow each other in memory are asked for together, which DRAM rewards."""
        weight_bytes: gl.constexpr = 2 * (
            w_desc.block_type.nbytes + (s_desc.block_type.nbytes if self.PACKED else 0)
        )
        row_bytes: gl.constexpr = x_desc.block_type.nbytes + (
            s_desc.block_type.nbytes if self.FP8 else 0
        )
        for i in gl.static_range(job.BURST):
            mbarrier.wait(self.empty.index(stage + i), phase)
            mbarrier.expect(self.full.index(stage + i), weight_bytes + row_bytes)
        for i in gl.static_range(job.BURST):
            at = [row0, (step + i) * job.W_COLUMNS]
            tma.async_load(w_desc, at, self.full.index(stage + i), self.w0.index(stage + i))
        for i in gl.static_range(job.BURST):
            at = [row1, job.UP_COLUMN + (step + i) * job.W_COLUMNS]
            tma.async_load(w_desc, at, self.full.index(stage + i), self.w1.index(stage + i))
        if self.PACKED:
            for i in gl.static_range(job.BURST):
                column = (step + i) * job.S_COLUMNS
                bar = self.full.index(stage + i)
                tma.async_load(s_desc, [row0, column], bar, self.v0.index(stage + i))
                tma.async_load(s_desc, [row1, column], bar, self.v1.index(stage + i))

    @gluon.jit
    def fetch_rows(self, x_desc, s_desc, job, stage, row, step, scale_at):
        """The activations of BURST steps, and their scales."""
        for i in gl.static_range(job.BURST):
            bar = self.full.index(stage + i)
            tile = self.rows(stage + i, x_desc.block_type.shape[0])
            tma.async_load(x_desc, [row, (step + i) * job.BLOCK_K], bar, tile)
            if self.FP8:
                at = scale_at + (step + i) * job.capacity
                tma.async_load(s_desc, [at], bar, self.s.index(stage + i))


@gluon.jit
def gdc_wait():
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def gdc_launch():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _stream_tile(ring, job, w_desc, x_desc, s_desc, tile, schedule, stage, phase, early):
    """Fetch one tile's stages; the weights of the first `early` of them are already under way."""
    expert, n, row, _rows = schedule.locate(tile)
    row0, row1 = job.first_rows(expert, n)
    x_row = expert * job.capacity + row
    scale_at = expert * job.steps_k * job.capacity + row
    for k in range(0, job.steps_k, job.BURST):
        if k >= early:
            ring.fetch_weights(w_desc, x_desc, s_desc, job, stage, phase, row0, row1, k)
        ring.fetch_rows(x_desc, s_desc, job, stage, x_row, k, scale_at)
        stage, phase = ring.advance(stage, phase, job.BURST)
    return stage, phase


@gluon.jit
def _stream_early(ring, job, w_desc, x_desc, s_desc, tile, schedule):
    """Fetch the first tile's weights, as many stages as the ring has; returns how many."""
    expert, n, _row, _rows = schedule.locate(tile)
    row0, row1 = job.first_rows(expert, n)
    early = gl.minimum(job.steps_k, ring.STAGES)
    for k in range(0, early, job.BURST):
        ring.fetch_weights(w_desc, x_desc, s_desc, job, k, gl.to_tensor(1), row0, row1, k)
    return early


@gluon.jit
def produce(ring, job, w_desc, x_desc, busy_desc, s_desc, counts_ptr, CHAINED: gl.constexpr):
    """Stream every tile of this program, without a pause between tiles."""
    schedule = Schedule.create(counts_ptr, job, 1)
    stage = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    early = gl.to_tensor(0)
    tile = gl.program_id(0)
    if CHAINED:
        # The previous launch still computes the activations; the weights do not depend on it.
        if tile < schedule.total:
            _e, _n, _row, rows = schedule.locate(tile)
            if rows > job.BLOCK_M:
                early = _stream_early(ring, job, w_desc, busy_desc, s_desc, tile, schedule)
            else:
                early = _stream_early(ring, job, w_desc, x_desc, s_desc, tile, schedule)
        gdc_wait()
    while tile < schedule.total:
        if job.BLOCK_M_BUSY > job.BLOCK_M:
            _e, _n, _row, rows = schedule.locate(tile)
            if rows > job.BLOCK_M:
                stage, phase = _stream_tile(
                    ring, job, w_desc, busy_desc, s_desc, tile, schedule, stage, phase, early
                )
            else:
                stage, phase = _stream_tile(
                    ring, job, w_desc, x_desc, s_desc, tile, schedule, stage, phase, early
                )
        else:
            stage, phase = _stream_tile(
                ring, job, w_desc, busy_desc, s_desc, tile, schedule, stage, phase, early
            )
        early = gl.to_tensor(0)
        tile += gl.num_programs(0)
