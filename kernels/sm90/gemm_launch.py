"""Arguments of the SM90 kernels: one GEMM, launched through Triton."""

from typing import Any

import triton

from ..formats import SCALE_BLOCK
from ..launch import Device, Tiles
from ..packing import STRIP
from ..problem import Problem, lane_count


def _prepare(
    p: Problem, tiles: Tiles, device: Device, chained: bool
) -> tuple[tuple[Any, ...], int, dict[str, Any]]:
    """Arguments, programs and options of one launch; `chained` overlaps its start with the end of
    the launch before."""
    experts, capacity, depth = p.x.shape
    fp8 = p.format.fp8_rows
    _step, second, tiles_n = p.geometry(tiles.block_n)
    # Interleaved, a tile's channels come from twice as many weight rows.
    spread = 2 if p.interleaved else 1
    aligned = SCALE_BLOCK % (spread * tiles.block_n) == 0 and (
        p.interleaved or second % tiles.block_n == 0
    )
    if fp8:  # a table written by hand may say otherwise, and the result would be wrong
        got = f"steps of {tiles.block_k} channels, rows scaled by {p.x_scale_group}"
        assert tiles.block_k == p.x_scale_group, got
    steps = triton.cdiv(depth, tiles.block_k)
    burst = tiles.burst if steps % tiles.burst == 0 else 1
    alpha, beta, limit, clamped = p.epilogue()
    arguments = (
        *_descriptors(p, tiles), p.w_scale, p.w_bias, p.masked_m, p.out, p.out_scale,
        experts, capacity, tiles_n, p.w_rows, steps, *p.block_grid(), p.width,
        tiles.block_n, tiles.block_m, tiles.block_m_busy, tiles.block_k, tiles.stages,
        lane_count(experts), burst, tiles.warp_groups, fp8, tiles.swap_ab, p.fused,
        p.format.weight_scale, not fp8 or aligned, chained, alpha, beta, limit or 0.0, clamped,
        depth if p.interleaved else 0, *_packed_step(p, tiles), tiles.scale_sums,
    )  # fmt: skip
    bound = experts * triton.cdiv(capacity, tiles.block_m) * tiles_n
    options = {
        "num_warps": tiles.warps // tiles.warp_groups,
        # Four more warps than multiply hold the one that streams; all share the registers.
        "maxnreg": min(240, 65536 // (tiles.per_sm * (tiles.warps + 4) * 32) // 8 * 8),
        "launch_pdl": chained or p.fused,
    }
    return arguments, min(bound, device.sms * tiles.per_sm), options


def _packed_step(p: Problem, tiles: Tiles) -> tuple[int, int, int, int, str]:
    """Channels that are described as one row; columns of a step, of weights and of their scales;
    inputs that share a scale, 0 where weights are not packed; and how they are dequantised."""
    fmt = p.format
    if not fmt.packed:
        return 1, tiles.block_k, 0, 0, "none"
    group = fmt.group_size
    assert tiles.block_k % group == 0, f"steps of {tiles.block_k}, groups of {group}"
    sums = not tiles.scale_sums or (tiles.block_k == group and fmt.code == "integer")
    assert sums, f"sums of {tiles.block_k} inputs: {fmt}"
    assert tiles.swap_ab, "packed weights are the first operand"
    scales = tiles.block_k // group * STRIP * fmt.scale_bytes // 4
    dequantise = "e2m1" if fmt.code == "e2m1" else "zero" if fmt.zero_points else "middle"
    return STRIP, 2 * tiles.block_k, scales, group, dequantise


def _descriptors(p: Problem, tiles: Tiles) -> tuple[Any, Any, Any, Any]:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    experts, capacity, depth = p.x.shape
    bits = 16 if p.x_scale is None else 8
    # Rows of a stage must fill the swizzle: 128 bytes, or 64 where a stage is that narrow.
    layout = NVMMASharedLayout(min(128, tiles.block_k * bits // 8), bits)

    def matrix(tensor: Any, rows: int, block: int, width: int = depth) -> Any:
        return TensorDescriptor(tensor, [rows, width], [width, 1], [block, tiles.block_k], layout)

    def strips(tensor: Any, columns: int) -> Any:
        _experts, _strips, width = tensor.shape
        size, block = [_experts * _strips, width], [tiles.block_n // STRIP, columns]
        return TensorDescriptor(tensor, size, [width, 1], block, NVMMASharedLayout(0, 32))

    rows = matrix(p.x, experts * capacity, tiles.block_m)
    scales = rows
    if p.x_scale is not None:
        flat = NVMMASharedLayout(0, 32, rank=1)
        size = p.x_scale.numel()
        scales = TensorDescriptor(p.x_scale, [size], [1], [max(tiles.block_m_busy, 32)], flat)
    if p.format.packed:
        _strip, w_columns, s_columns, _group, _how = _packed_step(p, tiles)
        weights, scales = strips(p.w, w_columns), strips(p.w_scale, s_columns)
    else:
        w_rows, spread = experts * p.w_rows, 2 if p.interleaved else 1
        weights = matrix(p.w, w_rows // spread, tiles.block_n, spread * depth)
    return weights, rows, matrix(p.x, experts * capacity, tiles.block_m_busy), scales


def run_hopper(p: Problem, tiles: Tiles, device: Device, *, chained: bool) -> None:
    """Launch one GEMM; tensors are as `problem.tma_ready` wants them."""
    from . import gemm_kernel

    arguments, grid, options = _prepare(p, tiles, device, chained)
    gemm_kernel.experts_kernel[(grid,)](*arguments, **options)


def compile_hopper(p: Problem, tiles: Tiles, device: Device, *, chained: bool) -> Any:
    """The compiled kernel of one GEMM, not run; stand-ins for tensors will do."""
    from . import gemm_kernel

    arguments, grid, options = _prepare(p, tiles, device, chained)
    return gemm_kernel.experts_kernel.warmup(*arguments, grid=(grid,), **options)
