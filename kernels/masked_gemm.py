"""Launchers of the masked GEMMs: gate and up with SwiGLU (fused), and the plain grouped GEMM."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from . import portable
from .experts_torch import (
    SCALE_BLOCK,
    dequantise_blocks_torch,
    dequantise_groups_torch,
)
from .launch import Device, Shape, Tiles, hopper_tiles, portable_launch, row_tile

INTERPRETER = Device("interpreter", (8, 9), 4)


@cache
def probe(index: int) -> Device:
    """What the launch choice needs to know of one GPU."""
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return Device(properties.name, capability, properties.multi_processor_count)


def device_of(tensor: torch.Tensor) -> Device:
    """`probe` of the tensor's GPU, or a stand-in under Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    if not tensor.is_cuda:
        raise ValueError(
            f"tensors are on {tensor.device}: the kernels need a GPU, or use the _torch twin"
        )
    return probe(tensor.device.index)


@dataclass(frozen=True, slots=True)
class Spec:
    """Stands for a tensor when a launcher only compiles."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    columns: bool = False  # the last two dimensions are transposed in memory

    def data_ptr(self) -> int:
        return 0

    def stride(self, dim: int | None = None) -> Any:
        strides: tuple[int, ...]
        if self.columns:
            strides = (self.shape[1] * self.shape[2], 1, self.shape[1])
        else:
            strides = tuple(torch.Size(self.shape[i + 1 :]).numel() for i in range(len(self.shape)))
        return strides if dim is None else strides[dim]

    def is_contiguous(self) -> bool:
        return not self.columns

    def view(self, dtype: torch.dtype) -> "Spec":
        return Spec(self.shape, dtype, self.columns)

    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class Problem:
    """One launch's tensors. `width` output channels per expert come from `w_rows` weight rows;
    the second tile of a program lies `second` rows after the first."""

    x: Any
    x_scale: Any
    w: Any
    w_scale: Any
    masked_m: Any
    out: Any
    out_scale: Any
    fused: bool
    x_group: int
    partial: Any = None  # float32 parts of a split depth, and
    counters: Any = None  # int32 arrivals, cleared by the fused launch

    @property
    def width(self) -> int:
        return self.out.shape[-1]

    def geometry(self, channels: int) -> tuple[int, int, int]:
        """(row step between programs, distance to the second tile, programs across the width)."""
        step = channels if self.fused else 2 * channels
        second = self.width if self.fused else channels
        return step, second, triton.cdiv(self.width, step)


def lane_count(experts: int) -> int:
    """Width of the vector that holds every expert's count."""
    return max(32, triton.next_power_of_2(experts))


def tma_ready(problem: Problem) -> bool:
    """Whether the tensors can be described to the copy engine: dense rows, 16-byte aligned."""
    tensors = [problem.x, problem.w]
    if problem.x_scale is not None:
        scale = problem.x_scale
        capacity, groups = problem.x.shape[1], scale.shape[2]
        if scale.stride() != (groups * capacity, 1, capacity) or scale.data_ptr() % 16:
            return False
    return all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)


def _run(kernel: Any, grid: int, args: tuple, compile_only: bool, **options: Any) -> Any:
    if compile_only:
        return kernel.warmup(*args, grid=(grid,), **options)
    return kernel[(grid,)](*args, **options)


def launch_hopper(
    p: Problem, tiles: Tiles, device: Device, *, chained: bool, compile_only: bool = False
) -> Any:
    """Warp-specialised kernel; `chained` overlaps its start with the end of the launch before."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import hopper

    experts, capacity, depth = p.x.shape
    w_rows = p.w.shape[1]
    fp8 = p.x_scale is not None
    _step, second, tiles_n = p.geometry(tiles.channels)
    bits = 8 if fp8 else 16
    # Rows of a stage must fill the swizzle: 128 bytes, or 64 where a stage is that narrow.
    layout = NVMMASharedLayout(min(128, tiles.depth * bits // 8), bits)

    def matrix(tensor: Any, rows: int, block: int) -> Any:
        return TensorDescriptor(tensor, [rows, depth], [depth, 1], [block, tiles.depth], layout)

    w_desc = matrix(p.w, experts * w_rows, tiles.channels)
    x_desc = matrix(p.x, experts * capacity, tiles.rows)
    big_desc = matrix(p.x, experts * capacity, tiles.many)
    s_desc = x_desc
    if fp8:
        flat = NVMMASharedLayout(0, 32, rank=1)
        s_desc = TensorDescriptor(p.x_scale, [p.x_scale.numel()], [1], [max(tiles.many, 32)], flat)
    aligned = not fp8 or (SCALE_BLOCK % tiles.channels == 0 and second % tiles.channels == 0)
    scale_rows, scale_cols = p.w_scale.shape[1:] if fp8 else (0, 0)
    to_clear = p.counters.numel() if p.fused and p.counters is not None else 0
    steps = triton.cdiv(depth, tiles.depth)
    burst = tiles.burst if steps % (tiles.split * tiles.burst) == 0 else 1
    args = (
        w_desc, x_desc, big_desc, s_desc, p.w_scale, p.masked_m, p.out, p.out_scale, p.partial,
        p.counters, to_clear, experts, capacity, tiles_n, w_rows,
        steps, scale_rows, scale_cols, p.width, tiles.channels, tiles.rows, tiles.many,
        tiles.depth, tiles.stages, lane_count(experts), tiles.split, burst, tiles.groups, fp8,
        tiles.swap, p.fused, aligned, chained,
    )  # fmt: skip
    bound = experts * triton.cdiv(capacity, tiles.rows) * tiles_n * tiles.split
    # Four more warps than multiply hold the one that streams; registers are shared among all.
    registers = min(240, 65536 // (tiles.per_sm * (tiles.warps + 4) * 32) // 8 * 8)
    return _run(
        hopper.experts_kernel, min(bound, device.sms * tiles.programs_per_sm), args, compile_only,
        num_warps=tiles.warps // tiles.groups, maxnreg=registers, launch_pdl=chained or p.fused,
    )  # fmt: skip


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
    return _run(portable.masked_gemm_kernel, grid, args, compile_only, num_warps=tiles.warps)


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
        launch_hopper(problem, tiles, device, chained=False)
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
