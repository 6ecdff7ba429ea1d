"""One masked GEMM as data: its tensors, or what stands for them, and the GPU that it runs on."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from .formats import SWIGLU, Activation, Format
from .launch import SCALES_ALIGNED, Device
from .packing import STRIP

ALIGNMENT = 16  # bytes; of what the copy engine reads, and what Triton specialises pointers on
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
    where the second tile of a program lies says `geometry`. `activation`: of the first of
    a layer's two launches, None in the second."""

    x: Any
    x_scale: Any
    w: Any
    w_scale: Any
    w_bias: Any
    masked_m: Any
    out: Any
    out_scale: Any
    format: Format
    activation: Activation | None
    x_scale_group: int

    @property
    def fused(self) -> bool:
        """Whether gate and up become one activation."""
        return self.activation is not None

    @property
    def interleaved(self) -> bool:
        """Whether the two tiles of a program take turns row by row."""
        return self.activation is not None and self.activation.interleaved

    @property
    def w_rows(self) -> int:
        """Output channels of one expert's weights, gates and ups counted apart."""
        rows = self.w.shape[1]
        return rows * STRIP if self.format.packed else rows

    @property
    def width(self) -> int:
        return self.out.shape[-1]

    def block_grid(self) -> tuple[int, int]:
        """Scale blocks of one expert, down and across; zeros without blocks."""
        rows, cols = self.w_scale.shape[1:] if self.format.weight_scale == "block" else (0, 0)
        return rows, cols

    def epilogue(self) -> tuple[float, float, float | None, bool]:
        """Constants of the activation: alpha, beta, limit, and whether it bounds the gate last."""
        a = self.activation or SWIGLU
        return a.alpha, a.beta, a.limit, a.kind == "swiglu_clamped"

    def geometry(self, channels: int) -> tuple[int, int, int]:
        """(row step between programs, distance to the second tile, programs across the width)."""
        step = channels if self.fused else 2 * channels
        second = self.width if self.fused else channels
        return step, second, triton.cdiv(self.width, step)


def lane_count(experts: int) -> int:
    """Width of the vector that holds every expert's count."""
    return max(32, triton.next_power_of_2(experts))


def tma_ready(problem: Problem) -> bool:
    """Whether the tensors can be described to the copy engine: dense rows, 16-byte aligned, and
    more than one row of capacity, which Triton would turn from an argument into a constant."""
    tensors = [problem.x, problem.w] + [problem.w_scale] * problem.format.packed
    if problem.x.shape[1] == 1:
        return False
    if problem.x_scale is not None:
        scale = problem.x_scale
        capacity, per_row = problem.x.shape[1], scale.shape[2]
        if scale.stride() != (per_row * capacity, 1, capacity) or scale.data_ptr() % ALIGNMENT:
            return False
        if capacity % SCALES_ALIGNED:
            return False
    return all(t.is_contiguous() and t.data_ptr() % ALIGNMENT == 0 for t in tensors)
