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
def _write(tile, out, job, row, rows, col, W_AXIS: gl.constexpr):
    """Store a tile's live rows to row-major `out`, given at the tile's first row."""
    BITS: gl.constexpr = out.dtype.element_ty.primitive_bitwidth
    LAYOUT: gl.constexpr = _store_layout(tile.shape, W_AXIS, gl.num_warps(), BITS)
    cols = col + gl.arange(0, tile.shape[W_AXIS], gl.SliceLayout(1 - W_AXIS, LAYOUT))
    at = gl.arange(0, tile.shape[1 - W_AXIS], gl.SliceLayout(W_AXIS, LAYOUT))
    offsets = gl.expand_dims(cols, 1 - W_AXIS) + gl.expand_dims(at * job.width, W_AXIS)
    live = gl.expand_dims(cols < job.width, 1 - W_AXIS) & gl.expand_dims(row + at < rows, W_AXIS)
    tile = gl.convert_layout(tile.to(out.dtype.element_ty), LAYOUT)
    gl.store(out + offsets, tile, mask=live)


@gluon.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)): relative error below 1e-5, and 0 below -88. No predicate and few
    registers: with the compiler's own exponential and division the loop before it spills."""
    return gl.inline_asm_elementwise(
        """{
            .reg .f32 e;
            mul.f32 e, $1, 0fBFB8AA3B; // -log2(e)
            ex2.approx.ftz.f32 e, e;
            add.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 $0, e;
        }""",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _activate(gate, up, variant):
    """`formats.Activation` of float32 products."""
    if variant.LIMIT > 0:
        up = gl.minimum(gl.maximum(up, -variant.LIMIT), variant.LIMIT)
        if not variant.CLAMPED:
            gate = gl.minimum(gate, variant.LIMIT)
    act = gate * _sigmoid(variant.ALPHA * gate)
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
def write_products(acc0, acc1, job, out, expert, n, row, rows, W_AXIS: gl.constexpr):
    """Both tiles as they are."""
    col = n * job.STEP
    base = out + (expert.to(gl.int64) * job.capacity + row) * job.width
    _write(acc0, base, job, row, rows, col, W_AXIS)
    _write(acc1, base, job, row, rows, col + job.second, W_AXIS)
