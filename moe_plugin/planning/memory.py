"""Bytes of the batched experts: arithmetic, nothing measured; what torch's allocator may add is a
bound.

Every batched tensor has ``local_experts * ranks * T = experts * T`` rows per rank, whatever the
number of ranks.
"""

from __future__ import annotations

from ..kernels import workspace as kernel_workspace
from ..kernels.formats import BF16, FP8_BLOCK, SCALE_BLOCK
from ..kernels.launch import Shape
from .integers import ceil_to

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
ALLOCATION = 512
"""Torch's allocator rounds every tensor up to a multiple of this, bytes."""
UNSPLIT = 1 << 20
"""And gives one that is larger than this a block of up to as much more: less it does not split."""


def allocated(size: int) -> int:
    """The most that the allocator takes for one tensor of ``size`` bytes."""
    return ceil_to(size, ALLOCATION) + (UNSPLIT if size > UNSPLIT else 0)


def received_sizes(rows: int, hidden: int, dtype: str, *, fp8: bool) -> tuple[int, ...]:
    """Tensors of the rows that a dispatch returns: in FP8 with scales, or in the activation
    dtype."""
    if fp8:
        return rows * hidden, rows * 4 * (hidden // SCALE_BLOCK)
    return (rows * hidden * DTYPE_BYTES.get(dtype, 2),)


def handle_sizes(rows: int, experts: int, local_experts: int) -> tuple[int, ...]:
    """Tensors that a dispatch returns beside them (DeepEP): where each row came from, the ranges of
    each pair of local expert and rank, and the counts."""
    return 4 * rows, 8 * experts, 4 * local_experts


def workspace_bytes(
    experts: int,
    max_tokens: int,
    hidden: int,
    intermediate: int,
    dtype: str,
    *,
    ranks: int = 1,
    fp8: bool = False,
    host: bool = False,
    batches: int = 1,
) -> int:
    """Bytes that one live MoE layer holds beside its weights, per rank.

    Args:
        experts: physical experts of the layer.
        max_tokens: tokens per rank.
        hidden: row width, elements.
        intermediate: inner width of one expert, elements.
        dtype: activation dtype by torch name.
        ranks: that share the experts.
        fp8: rows are dispatched, and activations re-quantised, in FP8.
        host: the host's experts, which store gate and up (2 x intermediate, bf16) before they
            activate them; ours activate them as they are computed.
        batches: that are between dispatch and combine at once; 2 with two-batch overlap. Each
            holds its rows and its result; their experts run one after the other.

    Received rows with their handle, the activation between the GEMMs, and the result that combine
    reads; each with what the allocator may add.
    """
    rows, local_experts = experts * max_tokens, experts // ranks
    size = DTYPE_BYTES.get(dtype, 2)
    received = received_sizes(rows, hidden, dtype, fp8=fp8)
    handle = handle_sizes(rows, experts, local_experts)
    result = rows * hidden * size
    act_dtype = dtype if dtype in DTYPE_BYTES else "bfloat16"
    weights = FP8_BLOCK if fp8 else BF16
    # Fewer experts than ranks are refused elsewhere.
    shape = Shape(max(1, local_experts), ranks * max_tokens, hidden, intermediate, weights)
    if host:
        group = kernel_workspace.MIN_SCALE_GROUP if fp8 else None
        layout = kernel_workspace.workspace_layout(shape, group, act_dtype)
        between = [layout.total, rows * 2 * intermediate * size]
    else:  # in one allocation
        between = [kernel_workspace.workspace_bytes(shape, act_dtype)]
    batch = sum(map(allocated, (*received, *handle, result)))
    return batches * batch + sum(map(allocated, between))


def gib(size: int) -> str:
    """``size`` bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
