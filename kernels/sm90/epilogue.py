"""The SM90 kernels behind the last product: activation, quantisation, and what reaches memory."""

# mypy: ignore-errors
# Device code: the types are the compiler's, not Python's.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import formats

FP8_MAX = gl.constexpr(formats.FP8_MAX)
MIN_AMAX = gl.constexpr(formats.MIN_AMAX)


@gluon.aggregate
class Variant:
    """What one launch computes.

    W_SCALE: "none", "block" (ALIGNED: a tile's channels share one), "channel" or "tensor". ALPHA,
    BETA, LIMIT (0: none) and CLAMPED: of `formats.Activation`."""

    SWAP_AB: gl.constexpr
    FUSED: gl.constexpr
    W_SCALE: gl.constexpr
    ALIGNED: gl.constexpr
    ALPHA: gl.constexpr
    BETA: gl.constexpr
    LIMIT: gl.constexpr
    CLAMPED: gl.constexpr


@gluon.constexpr_function
def _store_layout(shape, w_axis, warps, bits):
    """Layout for 16-byte stores along the channels. A warp keeps the elements that the product
    left in it, so that the conversion needs no shared memory and no barrier."""
    vec = 128 // bits
    wide = min(shape[0] // 16, warps)
    across = warps // wide
    if w_axis == 0:
        each = max(1, shape[1] // across // (2 * vec))
        return gl.BlockedLayout([vec, each], [16 // vec, 2 * vec], [wide, across], [0, 1])
    lanes = min(32, shape[1] // across // vec)
    return gl.BlockedLayout([max(1, lanes // 2), vec], [32 // lanes, lanes], [wide, across], [1, 0])


@gluon.jit
def _places(
    job, row, rows, col, pitch, LAYOUT: gl.constexpr, SHAPE: gl.constexpr, W_AXIS: gl.constexpr
):
    """Offsets of a tile's elements from its first row, and which of them are live."""
    cols = col + gl.arange(0, SHAPE[W_AXIS], gl.SliceLayout(1 - W_AXIS, LAYOUT))
    at = gl.arange(0, SHAPE[1 - W_AXIS], gl.SliceLayout(W_AXIS, LAYOUT))
    offsets = gl.expand_dims(cols, 1 - W_AXIS) + gl.expand_dims(at * pitch, W_AXIS)
    live = gl.expand_dims(cols < job.width, 1 - W_AXIS) & gl.expand_dims(row + at < rows, W_AXIS)
    return offsets, live


@gluon.jit
def _write(tile, out, job, row, rows, col, W_AXIS: gl.constexpr):
    """Store a tile's live rows to row-major `out`, given at the tile's first row."""
    BITS: gl.constexpr = out.dtype.element_ty.primitive_bitwidth
    LAYOUT: gl.constexpr = _store_layout(tile.shape, W_AXIS, gl.num_warps(), BITS)
    offsets, live = _places(job, row, rows, col, job.width, LAYOUT, tile.shape, W_AXIS)
    tile = gl.convert_layout(tile.to(out.dtype.element_ty), LAYOUT)
    gl.store(out + offsets, tile, mask=live)


@gluon.jit
def _add_parts(parts, out, job, row, rows, col, tile, W_AXIS: gl.constexpr):
    """Sum a tile's parts in a fixed order, whoever finished last, and write it."""
    MMA: gl.constexpr = tile.type.layout
    pitch = job.width * job.SPLIT_K
    offsets, live = _places(job, row, rows, col, pitch, MMA, tile.shape, W_AXIS)
    total = gl.zeros(tile.shape, gl.float32, MMA)
    for part in range(job.SPLIT_K):
        # Other programs wrote these: L1 must not answer.
        total += gl.load(
            parts + part * job.width + offsets, mask=live, other=0.0, cache_modifier=".cg"
        )
    _write(total, out, job, row, rows, col, W_AXIS)


@gluon.jit
def _activate(gate, up, variant):
    """`formats.Activation` of float32 products."""
    if variant.LIMIT > 0:
        up = gl.minimum(gl.maximum(up, -variant.LIMIT), variant.LIMIT)
        if not variant.CLAMPED:
            gate = gl.minimum(gate, variant.LIMIT)
    if variant.ALPHA == 1.0:
        act = gate / (1.0 + gl.exp(-gate))
    else:
        act = gate / (1.0 + gl.exp(-variant.ALPHA * gate))
    if variant.CLAMPED:
        act = gl.minimum(act, variant.LIMIT)
    if variant.BETA != 0.0:
        up = up + variant.BETA
    return act * up


@gluon.jit
def write_activation(
    acc0, acc1, job, variant, out, out_scale, expert, n, row, rows, FP8: gl.constexpr,
    MMA: gl.constexpr, W_AXIS: gl.constexpr,
):  # fmt: skip
    """Gate and up become one and, for fp8, one scale per row and BLOCK_N channels; channels past
    the width are zero."""
    act = _activate(acc0, acc1, variant)
    col = n * job.STEP
    if FP8:
        channels = col + gl.arange(0, job.BLOCK_N, gl.SliceLayout(1 - W_AXIS, MMA))
        act = gl.where(gl.expand_dims(channels < job.width, 1 - W_AXIS), act, 0.0)
        scale = gl.maximum(gl.max(gl.abs(act), axis=W_AXIS), MIN_AMAX) / FP8_MAX
        act = act * gl.expand_dims(1.0 / scale, W_AXIS)
        at = row + gl.arange(0, act.shape[1 - W_AXIS], gl.SliceLayout(W_AXIS, MMA))
        group = (expert.to(gl.int64) * job.tiles_n + n) * job.capacity
        gl.store(out_scale + group + at, scale, mask=at < rows)
    first = expert.to(gl.int64) * job.capacity + row
    _write(act, out + first * job.width, job, row, rows, col, W_AXIS)


@gluon.jit
def deposit(
    acc0, acc1, job, out, partial, counters, expert, n, part, row, rows, MMA: gl.constexpr,
    W_AXIS: gl.constexpr,
):  # fmt: skip
    """Write both tiles; where the depth is split, the last part to arrive adds them up."""
    first = expert.to(gl.int64) * job.capacity + row
    col = n * job.STEP
    base = out + first * job.width
    if job.SPLIT_K == 1:
        _write(acc0, base, job, row, rows, col, W_AXIS)
        _write(acc1, base, job, row, rows, col + job.second, W_AXIS)
    elif row < rows:  # a group whose rows are all past the count would arrive at another's counter
        pitch = job.width * job.SPLIT_K
        parts = partial + first * pitch
        mine = parts + part * job.width
        offsets, live = _places(job, row, rows, col, pitch, MMA, acc0.shape, W_AXIS)
        gl.store(mine + offsets, acc0, mask=live)
        offsets, live = _places(job, row, rows, col + job.second, pitch, MMA, acc0.shape, W_AXIS)
        gl.store(mine + offsets, acc1, mask=live)
        gl.barrier()
        # Counted within the expert: with an odd capacity two experts share eight rows.
        at = (expert * ((job.capacity + 7) // 8) + row // 8) * job.tiles_n + n
        if gl.atomic_add(counters + at, 1, sem="acq_rel", scope="gpu") == job.SPLIT_K - 1:
            _add_parts(parts, base, job, row, rows, col, acc0, W_AXIS)
            _add_parts(parts, base, job, row, rows, col + job.second, acc1, W_AXIS)
