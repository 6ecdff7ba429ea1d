"""A layer as its two GEMMs, and what lies between them."""

from typing import Any

import torch
import triton

from .experts_torch import SCALE_BLOCK
from .launch import Device, Launch, Shape, depth_split
from .problem import Problem, Spec

MIN_GROUP = 64  # the narrowest re-quantisation group that a launch may choose


class Workspace:
    """The tensors between two GEMMs, in one allocation of `total` bytes.

    act: [L, M, I], bf16, or float8_e4m3fn where it is re-quantised in groups of `group` channels;
    parts: [L * M, split, H] float32 of a second GEMM whose depth is split, and the counters of
    their arrival; scale: [L, M, ceil(I / group)] float32, column-major. Absent ones are None.
    """

    def __init__(self, shape: Shape, group: int | None, split: int) -> None:
        rows = shape.experts * shape.capacity
        act = torch.bfloat16 if group is None else torch.float8_e4m3fn
        self._specs: list[Spec | None] = [
            Spec((shape.experts, shape.capacity, shape.inter), act), None, None, None
        ]  # fmt: skip
        if split > 1:
            # Rounded up to four, so that the scales after them stay aligned.
            tiles = shape.experts * triton.cdiv(shape.capacity, 8)
            arrivals = tiles * triton.cdiv(shape.hidden, 2 * MIN_GROUP)
            self._specs[1] = Spec((rows, split, shape.hidden), torch.float32)
            self._specs[2] = Spec((triton.cdiv(arrivals, 4) * 4,), torch.int32)
        if group is not None:
            size = (shape.experts, shape.capacity, triton.cdiv(shape.inter, group))
            self._specs[3] = Spec(size, torch.float32, columns=True)
        self._offsets, self.total = [], 0
        for spec in self._specs:
            self._offsets.append(self.total)
            self.total += 0 if spec is None else spec.numel() * spec.dtype.itemsize

    @staticmethod
    def of(shape: Shape, launch: Launch, device: Device) -> "Workspace":
        """Of one launch; GPUs without fp8 keep the activation in bf16."""
        group = launch.gate_up.channels if shape.fp8 and device.has_fp8 else None
        return Workspace(shape, group, launch.down.split)

    def tensors(self, device: torch.device | str) -> list[torch.Tensor | None]:
        """Freshly allocated act, parts, arrivals and scale."""
        memory = torch.empty(self.total, dtype=torch.uint8, device=device)
        return [
            None if spec is None
            else memory.view(spec.dtype).as_strided(
                spec.shape, spec.stride(), offset // spec.dtype.itemsize
            )
            for spec, offset in zip(self._specs, self._offsets, strict=True)
        ]  # fmt: skip

    def specs(self) -> list[Spec | None]:
        """Stand-ins for them."""
        return list(self._specs)


def workspace_bytes(
    experts: int, capacity: int, hidden: int, inter: int, dtype: torch.dtype
) -> int:
    """The most bytes that `batched_experts` allocates beyond its output: the activation between
    the two GEMMs, for fp8 one float32 scale per row and 64 channels of it, and with one or two
    experts the float32 parts of the second GEMM. Only live rows are ever touched. GPUs without
    fp8 keep the activation in bf16; GPUs other than SM90 split no GEMM."""
    shape = Shape(experts, capacity, hidden, inter, dtype == torch.float8_e4m3fn)
    group = MIN_GROUP if shape.fp8 else None
    return Workspace(shape, group, depth_split(experts, hidden)).total


def layer_problems(
    x: Any, x_scale: Any, w13: Any, w13_scale: Any, w2: Any, w2_scale: Any, masked_m: Any,
    between: list[Any], out: Any, group: int,
) -> tuple[Problem, Problem]:  # fmt: skip
    """Both GEMMs of one layer; `between` as `Workspace` makes it."""
    act, parts, arrivals, scale = between
    gate_up = Problem(
        x, x_scale, w13, w13_scale, masked_m, act, scale, True, SCALE_BLOCK, None, arrivals
    )
    down = Problem(act, scale, w2, w2_scale, masked_m, out, None, False, group, parts, arrivals)
    return gate_up, down


def scale_specs(shape: Shape) -> tuple[Spec | None, Spec | None, Spec | None]:
    """Scales of rows, w13 and w2 as the kernels want them; None in bf16."""
    if not shape.fp8:
        return None, None, None
    experts, capacity, hidden, inter = shape.experts, shape.capacity, shape.hidden, shape.inter
    across, inner = triton.cdiv(hidden, SCALE_BLOCK), triton.cdiv(inter, SCALE_BLOCK)
    outer = triton.cdiv(2 * inter, SCALE_BLOCK)
    return (
        Spec((experts, capacity, hidden // SCALE_BLOCK), torch.float32, columns=True),
        Spec((experts, outer, across), torch.float32),
        Spec((experts, across, inner), torch.float32),
    )


def layer_specs(shape: Shape, launch: Launch, device: Device) -> tuple[Problem, Problem]:
    """The same of stand-ins, for compiling."""
    dtype = torch.float8_e4m3fn if shape.fp8 else torch.bfloat16
    rows, hidden, inter = (shape.experts, shape.capacity), shape.hidden, shape.inter
    x_scale, w13_scale, w2_scale = scale_specs(shape)
    return layer_problems(
        Spec((*rows, hidden), dtype), x_scale, Spec((shape.experts, 2 * inter, hidden), dtype),
        w13_scale, Spec((shape.experts, hidden, inter), dtype), w2_scale,
        Spec((shape.experts,), torch.int32), Workspace.of(shape, launch, device).specs(),
        Spec((*rows, hidden), torch.bfloat16), launch.gate_up.channels,
    )  # fmt: skip
