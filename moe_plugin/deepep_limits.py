"""The built-in backend: DeepEP (v1) low latency, its batched modes and its hard limits."""

from __future__ import annotations

from .capability import BatchedBackend, CapabilityFacts, Mode, register_backend
from .limits import Limits

HIDDEN_SIZES = frozenset({2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192})


def low_latency_rdma_bytes(max_tokens: int, hidden: int, ranks: int, experts: int) -> int:
    """RDMA bytes per rank; equals ``Buffer.get_low_latency_rdma_size_hint``.

    ``ranks`` has no influence: a rank keeps a slot for every expert and token of every peer.
    """
    del ranks
    scales = 4 * (hidden // 128)
    dispatch_msg = 16 + max(2 * hidden, hidden + scales)
    combine_msg = 2 * hidden + scales
    send = max(max_tokens * dispatch_msg, experts * max_tokens * combine_msg)
    recv = experts * max_tokens * max(dispatch_msg, combine_msg)
    signals = (4 * experts + 127) // 128 * 128
    total = 2 * send + 2 * recv + 2 * signals
    return (total + 128) // 128 * 128


def _batched_modes(facts: CapabilityFacts) -> frozenset[Mode]:
    """Mirror of the host's ``DeepEPMode.resolve``: ``auto`` batches decode only."""
    if facts.deepep_mode == "low_latency":
        return frozenset(Mode)
    if facts.deepep_mode == "auto" and facts.disaggregation_mode != "prefill":
        return frozenset({Mode.DECODE})
    return frozenset()


DEEPEP = register_backend(
    BatchedBackend(
        name="deepep",
        batched_modes=_batched_modes,
        explicit_flag="--moe-a2a-backend deepep --deepep-mode low_latency",
        limits=Limits(
            max_tokens=1024,
            capacity_variable="SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
            hidden_sizes=HIDDEN_SIZES,
            max_top_k=16,
            max_buffer_bytes=32 << 30,
            buffer_bytes=low_latency_rdma_bytes,
            dtypes=frozenset({"bfloat16"}),
        ),
    )
)
