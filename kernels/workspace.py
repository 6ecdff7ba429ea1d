"""The memory between a layer's two GEMMs, as integers: what kernels allocate and plans count."""

from dataclasses import dataclass
from math import prod

from .launch import Device, Launch, Shape, ceil_div

MIN_SCALE_GROUP = 64
"""The narrowest re-quantisation scale group that a launch may choose."""
ITEM_BYTES = {"float8_e4m3fn": 1, "bfloat16": 2, "float16": 2, "float32": 4, "int32": 4}


@dataclass(frozen=True, slots=True)
class Region:
    """A tensor at `offset` bytes of the workspace; dtype by torch's name.

    columns: the last two dimensions are transposed in memory.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str
    columns: bool = False

    @property
    def end(self) -> int:
        """First byte after it."""
        return self.offset + prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class WorkspaceLayout:
    """One allocation of `total` bytes.

    Attributes:
        act: [L, M, I], in `dtype`, or float8_e4m3fn where it is re-quantised.
        act_scale: [L, M, ceil(I / scale group)] float32, column-major, or None.
    """

    act: Region
    act_scale: Region | None
    total: int


def workspace_layout(
    shape: Shape, scale_group: int | None, dtype: str = "bfloat16"
) -> WorkspaceLayout:
    """Where everything lies. `scale_group`: channels of the activation that share a scale; None
    where it is not re-quantised."""
    experts, capacity = shape.experts, shape.capacity
    act = Region(
        0, (experts, capacity, shape.inter), dtype if scale_group is None else "float8_e4m3fn"
    )
    end, act_scale = act.end, None
    if scale_group is not None:
        size = (experts, capacity, ceil_div(shape.inter, scale_group))
        act_scale = Region(end, size, "float32", columns=True)
        end = act_scale.end
    return WorkspaceLayout(act, act_scale, end)


def launch_workspace(shape: Shape, launch: Launch, device: Device) -> WorkspaceLayout:
    """Of one launch; GPUs without fp8 keep the activation in bf16."""
    quantises = shape.format.fp8_rows and device.has_fp8
    return workspace_layout(shape, launch.gate_up.block_n if quantises else None)


def workspace_bytes(shape: Shape, dtype: str = "bfloat16") -> int:
    """The most bytes that a layer allocates beyond its output, whatever the launch.

    The activation between the two GEMMs (`dtype`, or FP8 with one float32 scale per row and
    `MIN_SCALE_GROUP` channels). Only live rows are ever touched. GPUs without FP8 keep the
    activation in bf16.
    """
    scale_group = MIN_SCALE_GROUP if shape.format.fp8_rows else None
    return workspace_layout(shape, scale_group, dtype).total
