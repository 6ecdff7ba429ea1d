"""Mooncake EP: DeepEP's low-latency layout with smaller messages; always FP8 rows in the host."""

from __future__ import annotations

from ..batched_backend import BatchedBackend, unless_normal
from ..planning.limits import Limits

WORKSPACE = 32 << 20


def buffer_bytes(max_tokens: int, hidden: int, ranks: int, experts: int) -> int:
    """Bytes per rank; equals Mooncake's ``get_ep_buffer_size_hint``. ``ranks`` has no influence."""
    del ranks
    return 4 * experts * (4 + max_tokens * (32 + 2 * hidden))


def device_bytes(ep_bytes: int) -> int:
    """The buffer and Mooncake's workspace. What its transports take was not measured."""
    return ep_bytes + WORKSPACE


MOONCAKE = BatchedBackend(
    name="mooncake",
    batched_modes=unless_normal,
    explicit_flag="--moe-a2a-backend mooncake --deepep-mode low_latency",
    limits=Limits(
        name="Mooncake EP",
        max_tokens=1024,
        tokens_variable="SGLANG_MOONCAKE_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
        buffer_bytes=buffer_bytes,
        device_bytes=device_bytes,
        dtypes=frozenset({"bfloat16"}),
        row_multiple=4,
        sources=(
            ("max_tokens", "assert in the host's token_dispatcher/mooncake.py; FINISHED_SUM_TAG"),
            ("hidden_sizes", "none: 0.3.14 compiles for the shape; 0.3.13 had eight, top-k <= 11"),
            ("buffer_bytes", "BufferPair in mooncake_ep_buffer.h"),
            ("device_bytes", "NUM_WORKSPACE_BYTES in mooncake_ep_configs.cuh"),
            ("dtypes", "x.dtype == torch.bfloat16 (mooncake_ep_buffer.py)"),
            ("row_multiple", "(ranks * T) % 4 == 0 with FP8 rows (mooncake_ep_buffer.py)"),
        ),
    ),
    module="mooncake",
    package="mooncake-transfer-engine",
    low_latency_only=True,
    bf16_variable=None,
)
