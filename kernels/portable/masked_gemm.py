"""Launchers of the portable masked GEMM, and the plain grouped GEMM on its own."""

from typing import Any

import torch
import triton

from ..experts_torch import SCALE_BLOCK, dequantise_blocks_torch, dequantise_groups_torch
from ..launch import Device, Shape, Tiles, hopper_tiles, portable_launch, row_tile
from ..problem import Problem, device_of, lane_count, tma_ready
from ..sm90.gemm_launch import run_hopper
from . import masked_gemm_kernel


def launch_portable(p: Problem, tiles: Tiles, device: Device, *, compile_only: bool = False) -> Any:
    """Pointer-based kernel for any GPU."""
    experts, capacity, depth = p.x.shape
    fp8_w = p.w_scale is not None
    fp8_x = p.x_scale is not None
    decode = fp8_w and not device.has_fp8
    step, second, tiles_n = p.geometry(tiles.channels)
    scale_rows, scale_cols = p.w_scale.shape[1:] if fp8_w else (0, 0)
    s_strides = p.x_scale.stride() if fp8_x else (0, 0, 0)
    block_k = min(tiles.depth, p.x_group) if fp8_x else tiles.depth
    args = (
        p.x.view(torch.uint8) if decode and fp8_x else p.x, p.x_scale,
        p.w.view(torch.uint8) if decode else p.w, p.w_scale, p.masked_m, p.out, p.out_scale,
        experts, capacity, tiles_n, step, second, depth, p.width, p.x.stride(0), p.x.stride(1),
        p.w.stride(0), p.w.stride(1), *s_strides, p.w.shape[1], scale_rows, scale_cols,
        tiles.channels, tiles.rows, block_k, tiles.stages, lane_count(experts), p.fused,
        p.x_group if fp8_x else 0, fp8_w, p.out_scale is not None, decode, decode and fp8_x,
        triton.knobs.runtime.interpret,
    )  # fmt: skip
    bound = experts * triton.cdiv(capacity, tiles.rows) * tiles_n
    grid = min(bound, device.sms * tiles.programs_per_sm)
    kernel, options = masked_gemm_kernel.masked_gemm_kernel, {"num_warps": tiles.warps}
    if compile_only:
        return kernel.warmup(*args, grid=(grid,), **options)
    return kernel[(grid,)](*args, **options)


def masked_grouped_gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    w: torch.Tensor,
    w_scale: torch.Tensor | None,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [L, M, K] times w [L, N, K] transposed, to bf16 [L, M, N]; rows and scales as in
    `batched_experts`. The plain half of the unfused layer."""
    experts, capacity, depth = x.shape
    fp8, width, device = x_scale is not None, w.shape[1], device_of(x)
    if out is None:
        out = torch.empty((experts, capacity, width), dtype=torch.bfloat16, device=x.device)
    problem = Problem(x, x_scale, w, w_scale, masked_m, out, None, False, SCALE_BLOCK)
    if device.has_wgmma and tma_ready(problem):
        rows = min(64, row_tile(expected_m))
        tiles = hopper_tiles(64, rows, 64, 128 if fp8 else 64, fp8)
        run_hopper(problem, tiles, device, chained=False)
    else:
        shape = Shape(experts, capacity, depth, width, fp8)
        launch_portable(problem, portable_launch(shape, expected_m).down, device)
    return out


def masked_grouped_gemm_torch(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    w: torch.Tensor,
    w_scale: torch.Tensor | None,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`masked_grouped_gemm` in plain torch, accumulating in float32."""
    del expected_m
    if x_scale is not None and w_scale is not None:
        x, w = dequantise_groups_torch(x, x_scale), dequantise_blocks_torch(w, w_scale)
    live = (torch.arange(x.shape[1], device=x.device) < masked_m[:, None])[..., None]
    y = (torch.where(live, x.float(), 0.0) @ w.float().transpose(1, 2)).bfloat16()
    if out is None:
        return y
    return out.copy_(torch.where(live, y, out))
