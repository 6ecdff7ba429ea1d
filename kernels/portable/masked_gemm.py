"""Arguments of the portable kernel: one GEMM, launched through Triton."""

from typing import Any

import torch
import triton

from ..launch import Device, Tiles
from ..problem import Problem, lane_count
from . import masked_gemm_kernel


def launch_portable(p: Problem, tiles: Tiles, device: Device, *, compile_only: bool = False) -> Any:
    """Pointer-based kernel for any GPU."""
    experts, capacity, depth = p.x.shape
    fp8_w = p.format.weight_bits == 8
    fp8_x = p.x_scale is not None
    widen = fp8_w and not device.has_fp8
    step, second, tiles_n = p.geometry(tiles.block_n)
    scale_rows, scale_cols = p.block_grid()
    s_strides = p.x_scale.stride() if fp8_x else (0, 0, 0)
    g_strides = p.w_scale.stride()[:2] if p.format.packed else (0, 0)
    block_k = min(tiles.block_k, p.x_scale_group) if fp8_x else tiles.block_k
    args = (
        p.x.view(torch.uint8) if widen and fp8_x else p.x, p.x_scale,
        p.w.view(torch.uint8) if widen else p.w, p.w_scale, p.w_bias, p.masked_m, p.out,
        p.out_scale,
        experts, capacity, tiles_n, step, second, depth, p.width, p.x.stride(0), p.x.stride(1),
        p.w.stride(0), p.w.stride(1), *s_strides, p.w_rows, scale_rows, scale_cols, *g_strides,
        tiles.block_n, tiles.block_m, block_k, tiles.stages, lane_count(experts), p.fused,
        p.x_scale_group if fp8_x else 0, p.format.weight_scale, p.out_scale is not None, widen,
        widen and fp8_x, *p.epilogue(), p.interleaved, p.format.group_size, p.format.zero_points,
        p.format.code == "e2m1",
        triton.knobs.runtime.interpret,
    )  # fmt: skip
    bound = experts * triton.cdiv(capacity, tiles.block_m) * tiles_n
    grid = min(bound, device.sms * tiles.per_sm)
    kernel, options = masked_gemm_kernel.masked_gemm_kernel, {"num_warps": tiles.warps}
    if compile_only:
        return kernel.warmup(*args, grid=(grid,), **options)
    return kernel[(grid,)](*args, **options)
