"""Bytes of the batched experts: exact arithmetic, nothing measured, nothing imported.

Rows of every batched tensor are ``local_experts * ranks * T = experts * T`` per rank, so that
none of these sizes depends on the number of ranks.
"""

from __future__ import annotations

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def workspace_bytes(
    experts: int, max_tokens: int, hidden: int, intermediate: int, dtype: str
) -> int:
    """Bytes that one live MoE layer of ours needs beside its weights, per rank.

    Args:
        experts: physical experts of the layer.
        max_tokens: tokens per rank.
        hidden: row width, elements.
        intermediate: inner width of one expert, elements.
        dtype: activation dtype by torch name.

    Received rows, the activated rows between the two GEMMs and the result. The gate and up
    halves are activated as they are computed and never stored.
    """
    size = DTYPE_BYTES.get(dtype, 2)
    return experts * max_tokens * (2 * hidden + intermediate) * size


def host_workspace_bytes(
    experts: int, max_tokens: int, hidden: int, intermediate: int, dtype: str
) -> int:
    """The same for a runner of the host's, which stores gate and up before activating them."""
    size = DTYPE_BYTES.get(dtype, 2)
    return experts * max_tokens * (2 * hidden + 3 * intermediate) * size


def gib(size: int) -> str:
    """``size`` bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
