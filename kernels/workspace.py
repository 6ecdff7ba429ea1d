"""The memory between a layer's two GEMMs, as integers: what kernels allocate and plans count."""

from dataclasses import dataclass
from math import prod

from .launch import Device, Launch, Shape, ceil_div, depth_split

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
        parts: [L * M, split_k, H] float32 of a second GEMM whose depth is split, or None.
        arrivals: int32 counters of their arrival, or None.
        act_scale: [L, M, ceil(I / scale group)] float32, column-major, or None.
    """

    act: Region
    parts: Region | None
    arrivals: Region | None
    act_scale: Region | None
    total: int


def workspace_layout(
    shape: Shape, scale_group: int | None, split_k: int, dtype: str = "bfloat16"
) -> WorkspaceLayout:
    """Where everything lies. `scale_group`: channels of the activation that share a scale; None
    where it is not re-quantised."""
    experts, capacity = shape.experts, shape.capacity
    act = Region(
        0, (experts, capacity, shape.inter), dtype if scale_group is None else "float8_e4m3fn"
    )
    end, parts, arrivals, act_scale = act.end, None, None, None
    if split_k > 1:
        parts = Region(end, (experts * capacity, split_k, shape.hidden), "float32")
        tiles = experts * ceil_div(capacity, 8) * ceil_div(shape.hidden, 2 * MIN_SCALE_GROUP)
        # Rounded up to four, so that the scales after them stay aligned.
        arrivals = Region(parts.end, (ceil_div(tiles, 4) * 4,), "int32")
        end = arrivals.end
    if scale_group is not None:
        size = (experts, capacity, ceil_div(shape.inter, scale_group))
        act_scale = Region(end, size, "float32", columns=True)
        end = act_scale.end
    return WorkspaceLayout(act, parts, arrivals, act_scale, end)


def launch_workspace(shape: Shape, launch: Launch, device: Device) -> WorkspaceLayout:
    """Of one launch; GPUs without fp8 keep the activation in bf16."""
    quantises = shape.format.fp8_rows and device.has_fp8
    return workspace_layout(
        shape, launch.gate_up.block_n if quantises else None, launch.down.split_k
    )


def workspace_bytes(shape: Shape, dtype: str = "bfloat16") -> int:
    """The most bytes that a layer allocates beyond its output, whatever the launch.

    The activation between the two GEMMs (`dtype`, or FP8 with one float32 scale per row and
    `MIN_SCALE_GROUP` channels), and where the depth of the second is split its float32 parts. Only
    live rows are ever touched. GPUs without FP8 keep the activation in bf16; GPUs other than SM90
    split no GEMM.
    """
    scale_group = MIN_SCALE_GROUP if shape.format.fp8_rows else None
    return workspace_layout(
        shape, scale_group, depth_split(shape.experts, shape.hidden), dtype
    ).total
