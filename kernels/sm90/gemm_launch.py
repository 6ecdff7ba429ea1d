"""Arguments of the SM90 kernels: one GEMM, launched through Triton."""

from typing import Any

import triton

from ..experts_torch import SCALE_BLOCK
from ..launch import Device, Tiles
from ..problem import Problem, lane_count


def _prepare(
    p: Problem, tiles: Tiles, device: Device, chained: bool
) -> tuple[tuple[Any, ...], int, dict[str, Any]]:
    """Arguments, programs and options of one launch; `chained` overlaps its start with the end of
    the launch before."""
    experts, capacity, depth = p.x.shape
    w_rows = p.w.shape[1]
    fp8 = p.x_scale is not None
    _step, second, tiles_n = p.geometry(tiles.channels)
    aligned = not fp8 or (SCALE_BLOCK % tiles.channels == 0 and second % tiles.channels == 0)
    scale_rows, scale_cols = p.w_scale.shape[1:] if fp8 else (0, 0)
    if fp8:  # a table written by hand may say otherwise, and the result would be wrong
        got = f"steps of {tiles.depth} channels, rows scaled by {p.x_group}"
        assert tiles.depth == p.x_group, got
    to_clear = p.counters.numel() if p.fused and p.counters is not None else 0
    steps = triton.cdiv(depth, tiles.depth)
    burst = tiles.burst if steps % (tiles.split * tiles.burst) == 0 else 1
    arguments = (
        *_descriptors(p, tiles), p.w_scale, p.masked_m, p.out, p.out_scale, p.partial, p.counters,
        to_clear, experts, capacity, tiles_n, w_rows, steps, scale_rows, scale_cols, p.width,
        tiles.channels, tiles.rows, tiles.many, tiles.depth, tiles.stages, lane_count(experts),
        tiles.split, burst, tiles.groups, fp8, tiles.swap, p.fused, aligned, chained,
    )  # fmt: skip
    bound = experts * triton.cdiv(capacity, tiles.rows) * tiles_n * tiles.split
    options = {
        "num_warps": tiles.warps // tiles.groups,
        # Four more warps than multiply hold the one that streams; all share the registers.
        "maxnreg": min(240, 65536 // (tiles.per_sm * (tiles.warps + 4) * 32) // 8 * 8),
        "launch_pdl": chained or p.fused,
    }
    return arguments, min(bound, device.sms * tiles.per_sm), options


def _descriptors(p: Problem, tiles: Tiles) -> tuple[Any, Any, Any, Any]:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    experts, capacity, depth = p.x.shape
    bits = 16 if p.x_scale is None else 8
    # Rows of a stage must fill the swizzle: 128 bytes, or 64 where a stage is that narrow.
    layout = NVMMASharedLayout(min(128, tiles.depth * bits // 8), bits)

    def matrix(tensor: Any, rows: int, block: int) -> Any:
        return TensorDescriptor(tensor, [rows, depth], [depth, 1], [block, tiles.depth], layout)

    rows = matrix(p.x, experts * capacity, tiles.rows)
    scales = rows
    if p.x_scale is not None:
        flat = NVMMASharedLayout(0, 32, rank=1)
        size = p.x_scale.numel()
        scales = TensorDescriptor(p.x_scale, [size], [1], [max(tiles.many, 32)], flat)
    return (
        matrix(p.w, experts * p.w.shape[1], tiles.channels),
        rows,
        matrix(p.x, experts * capacity, tiles.many),
        scales,
    )


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
