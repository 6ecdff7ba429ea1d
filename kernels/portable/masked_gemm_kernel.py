"""Masked GEMM in plain Triton: every GPU from SM80 on, and CPU through Triton's interpreter.

As in `sm90/gemm_kernel.py`, weights are the wide operand and each program owns two weight tiles:
the gate and the up rows of the same channels (fused), or two neighbouring tiles (plain). Tensors
are read through pointers, by stride, and rows past an expert's count are never touched.
"""

import triton
import triton.language as tl

from .. import formats, packing

FP8_MAX = tl.constexpr(formats.FP8_MAX)
MIN_AMAX = tl.constexpr(formats.MIN_AMAX)
SCALE_BLOCK = tl.constexpr(formats.SCALE_BLOCK)
STRIP = tl.constexpr(packing.STRIP)
MIDDLE = tl.constexpr(packing.MIDDLE)


@triton.jit
def load_counts(counts_ptr, experts, capacity, tiles_n, BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """Per-expert row counts, within the capacity, and the inclusive prefix of their tiles."""
    lanes = tl.arange(0, LANES)
    counts = tl.load(counts_ptr + lanes, mask=lanes < experts, other=0)
    counts = tl.minimum(tl.maximum(counts, 0), capacity)
    return counts, tl.cumsum((counts + BLOCK_M - 1) // BLOCK_M * tiles_n, 0)


@triton.jit
def locate(tile, counts, ends, BLOCK_M: tl.constexpr, LANES: tl.constexpr):
    """(expert, weight tile, first row, live rows) of one live tile; row tiles vary fastest."""
    passed = ends <= tile
    expert = tl.sum(passed.to(tl.int32), 0)
    first = tl.max(tl.where(passed, ends, 0), 0)
    rows = tl.sum(tl.where(tl.arange(0, LANES) == expert, counts, 0), 0)
    row_tiles = (rows + BLOCK_M - 1) // BLOCK_M
    local = tile - first
    return expert, local // row_tiles, (local % row_tiles) * BLOCK_M, rows


@triton.jit
def _widen_e4m3(byte):
    """float8_e4m3fn bytes to bfloat16, exactly, for GPUs that lack the type (NaN reads as 480)."""
    bits = byte.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return (half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(tl.bfloat16)


@triton.jit
def _bf16_half(word, high):
    """One of the two bf16 of an int32, as float32."""
    return tl.where(high, word & -65536, word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _load_e2m1(s, q, pair, ks, g, h, UPCAST: tl.constexpr):
    """The same of MXFP4, whose magnitude and sign lie apart (`packing.PLACES`)."""
    magnitude = (q >> tl.where(pair == 3, 12, 6 - 3 * pair)) & 7
    sign = tl.where(pair == 0, 15, tl.where(pair == 1, 10, tl.where(pair == 2, 9, 11)))
    value = tl.where(magnitude < 2, 0.5 * magnitude, 0.0)
    value = tl.where((magnitude >= 2) & (magnitude < 4), 0.5 * magnitude, value)
    value = tl.where((magnitude >= 4) & (magnitude < 6), 1.0 * magnitude - 2, value)
    value = tl.where(magnitude >= 6, 2.0 * magnitude - 8, value)
    value = tl.where(((q >> sign) & 1) != 0, -value, value)
    words = tl.load(s + (ks // 64 * 8)[None, :] + g)
    exponent = (words >> ((ks // 32 % 2 * 16)[None, :] + 8 * h)) & 255
    # A float32 whose exponent it is: 2**(exponent - 127).
    scale = tl.where(exponent == 0, 1 << 22, exponent << 23).to(tl.float32, bitcast=True)
    return cast(value * scale, tl.bfloat16, UPCAST)


@triton.jit
def _load_packed(
    w, s, rows, ks, stride_wn, stride_sn, GROUP: tl.constexpr, ZERO: tl.constexpr,
    E2M1: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[rows, inputs] of packed weights in bf16: the word of each from `packing`'s formula. Eight
    weights of a word are as many loads of it, which the first-level cache answers."""
    strip = (rows // STRIP).to(tl.int64)[:, None]
    g = (rows % 8)[:, None]
    h = (rows // 8 % 2)[:, None]
    k = ks % 16
    word = ks // 64 * 128 + k % 8 // 2 * 4 + ks % 64 // 16
    q = tl.load(w + strip * stride_wn + word[None, :] + g * 16) >> (k % 2 * 16)[None, :]
    pair = (k // 8 * 2)[None, :] + h
    if E2M1:
        return _load_e2m1(s + strip * stride_sn, q, pair, ks, g, h, UPCAST)
    code = (q >> (4 * pair)) & 15
    WITHIN: tl.constexpr = max(1, 64 // GROUP)
    group = ks // GROUP
    at = (group // WITHIN * (8 * WITHIN) + group % WITHIN)[None, :] + g * WITHIN
    s_at = s + strip * stride_sn + at * (2 if ZERO else 1)
    scale = _bf16_half(tl.load(s_at), h == 1)
    zero = (_bf16_half(tl.load(s_at + 1), h == 1) - 128.0) if ZERO else 1.0 * MIDDLE
    return cast((code.to(tl.float32) - zero) * scale, tl.bfloat16, UPCAST)


@triton.jit
def _dot(a, b, WIDEN_A: tl.constexpr, WIDEN_B: tl.constexpr, UPCAST: tl.constexpr):
    if WIDEN_A:
        a = _widen_e4m3(a)
    if WIDEN_B:
        b = _widen_e4m3(b)
    if UPCAST:  # the interpreter's bf16 dot is wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, out_dtype=tl.float32)


@triton.jit
def cast(x, dtype: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        # The interpreter truncates to bf16 and loses the carry of e4m3: round to nearest first.
        DROP: tl.constexpr = 16 if dtype == tl.bfloat16 else 20
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + (1 << (DROP - 1)) - 1 + ((bits >> DROP) & 1)) >> DROP << DROP
        fine = x
        x = nearest.to(tl.float32, bitcast=True)
        if dtype == tl.float8e4nv:  # below its smallest normal, multiples of 2**-9
            x = tl.where(tl.abs(fine) < 0.015625, (fine + 24576.0) - 24576.0, x)
    return x.to(dtype)


@triton.jit
def activate(
    gate, up, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, CLAMPED: tl.constexpr
):
    """`formats.Activation` of float32 products."""
    if LIMIT is not None:
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        if not CLAMPED:
            gate = tl.minimum(gate, LIMIT)
    act = gate / (1.0 + tl.exp(-gate if ALPHA == 1.0 else -ALPHA * gate))
    if CLAMPED:
        act = tl.minimum(act, LIMIT)
    if BETA != 0.0:
        up = up + BETA
    return act * up


@triton.jit
def masked_gemm_kernel(
    x, s_x, w, s_w, b_w, counts_ptr, out, s_out, experts, capacity, tiles_n, step, second, depth,
    width, stride_xe, stride_xm, stride_we, stride_wn, stride_se, stride_sm, stride_sk, w_rows,
    scale_rows, scale_cols, stride_ge, stride_gn,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    LANES: tl.constexpr, FUSED: tl.constexpr, X_SCALE_GROUP: tl.constexpr, W_SCALE: tl.constexpr,
    QUANTISE: tl.constexpr, WIDEN_W: tl.constexpr, WIDEN_X: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, LIMIT: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, E2M1: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    counts, ends = load_counts(counts_ptr, experts, capacity, tiles_n, BLOCK_M, LANES)
    total = tl.max(ends, 0)
    channel = tl.arange(0, BLOCK_N)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, n, row, rows = locate(tile, counts, ends, BLOCK_M, LANES)
        e64 = expert.to(tl.int64)
        col = n * step
        at = row + tl.arange(0, BLOCK_M)
        live = at < rows
        if INTERLEAVED:
            rows0 = tl.minimum(2 * (col + channel), w_rows - 2)
            rows1 = rows0 + 1
        else:
            rows0 = tl.minimum(col + channel, w_rows - 1)
            rows1 = tl.minimum(col + second + channel, w_rows - 1)
        w0 = w + e64 * stride_we + (rows0.to(tl.int64) * stride_wn)[:, None]
        w1 = w + e64 * stride_we + (rows1.to(tl.int64) * stride_wn)[:, None]
        x_at = x + e64 * stride_xe + (at.to(tl.int64) * stride_xm)[None, :]
        acc0 = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        acc1 = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for k in tl.range(0, tl.cdiv(depth, BLOCK_K), num_stages=STAGES):
            ks = k * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = ks < depth
            a = tl.load(x_at + ks[:, None], mask=inside[:, None] & live[None, :], other=0.0)
            if W_SCALE == "group":  # stored over whole steps
                w_e = w + e64 * stride_we
                s_e = s_w + e64 * stride_ge
                b0 = _load_packed(
                    w_e, s_e, rows0, ks, stride_wn, stride_gn, GROUP, ZERO, E2M1, UPCAST
                )
                b1 = _load_packed(
                    w_e, s_e, rows1, ks, stride_wn, stride_gn, GROUP, ZERO, E2M1, UPCAST
                )
            else:
                b0 = tl.load(w0 + ks[None, :], mask=inside[None, :], other=0.0)
                b1 = tl.load(w1 + ks[None, :], mask=inside[None, :], other=0.0)
            part0 = _dot(b0, a, WIDEN_W, WIDEN_X, UPCAST)
            part1 = _dot(b1, a, WIDEN_W, WIDEN_X, UPCAST)
            if W_SCALE == "block":
                s_at = s_w + e64 * scale_rows * scale_cols + k * BLOCK_K // SCALE_BLOCK
                part0 *= tl.load(s_at + rows0 // SCALE_BLOCK * scale_cols)[:, None]
                part1 *= tl.load(s_at + rows1 // SCALE_BLOCK * scale_cols)[:, None]
            if X_SCALE_GROUP > 0:
                x_scale = tl.load(
                    s_x + e64 * stride_se + at.to(tl.int64) * stride_sm
                    + (k * BLOCK_K // X_SCALE_GROUP) * stride_sk,
                    mask=live, other=0.0,
                )  # fmt: skip
                part0 *= x_scale[None, :]
                part1 *= x_scale[None, :]
            acc0 += part0
            acc1 += part1
        if W_SCALE == "channel":
            acc0 *= tl.load(s_w + e64 * w_rows + rows0)[:, None]
            acc1 *= tl.load(s_w + e64 * w_rows + rows1)[:, None]
        if W_SCALE == "tensor":
            acc0 *= tl.load(s_w + expert)
            acc1 *= tl.load(s_w + expert)
        if b_w is not None:
            acc0 += tl.load(b_w + e64 * w_rows + rows0)[:, None]
            acc1 += tl.load(b_w + e64 * w_rows + rows1)[:, None]
        o_at = out + e64 * capacity * width + (at.to(tl.int64) * width)[None, :]
        cols = col + channel
        mask = (cols < width)[:, None] & live[None, :]
        if FUSED:
            act = activate(acc0, acc1, ALPHA, BETA, LIMIT, CLAMPED)
            if QUANTISE:
                act = tl.where(mask, act, 0.0)
                scale = tl.maximum(tl.max(tl.abs(act), 0), MIN_AMAX) / FP8_MAX
                act = act * (1.0 / scale)[None, :]
                tl.store(s_out + (e64 * tiles_n + n) * capacity + at, scale, mask=live)
            tl.store(o_at + cols[:, None], cast(act, out.dtype.element_ty, UPCAST), mask=mask)
        else:
            tl.store(o_at + cols[:, None], cast(acc0, out.dtype.element_ty, UPCAST), mask=mask)
            cols += second
            mask = (cols < width)[:, None] & live[None, :]
            tl.store(o_at + cols[:, None], cast(acc1, out.dtype.element_ty, UPCAST), mask=mask)
