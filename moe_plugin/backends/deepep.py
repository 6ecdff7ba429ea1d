"""DeepEP (v1) low latency: its batched modes and its hard limits."""

from __future__ import annotations

from ..batched_backend import BatchedBackend, CapabilityFacts, Mode
from ..planning.integers import ceil_to
from ..planning.limits import Limits

TOKENS_VARIABLE = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
HIDDEN_SIZES = frozenset({2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192})
"""Kernel instances in sgl-deep-ep 0.1.2.post1. DeepEP's main branch lacks 3584."""

NVSHMEM_GRANULE = 512 << 20
"""DeepEP sets ``NVSHMEM_CUMEM_GRANULARITY=2**29``: the heap grows in steps of 512 MiB."""

NVSHMEM_FIXED_BYTES = 4480 << 20
"""Bound of what creating a buffer takes beyond its granules. benchmarks/results/README.md has
the likely reason.

Measured in servers with T = 256, 128 experts, hidden 2048: one rank 4240 MiB on an H200 and 4246
MiB on an H100, two ranks 4298 and 4354 MiB (benchmarks/results/*serving*.json). In processes that
have done little else before it was 2640 MiB, and 172 MiB for each of two ranks on one GPU."""


def low_latency_rdma_bytes(max_tokens: int, hidden: int, ranks: int, experts: int) -> int:
    """RDMA bytes per rank; equals ``Buffer.get_low_latency_rdma_size_hint``.

    ``ranks`` has no influence: a rank keeps a slot for every expert and token of every peer.
    """
    del ranks
    return layout_bytes(max_tokens, hidden, experts, signal=4)


def layout_bytes(max_tokens: int, hidden: int, experts: int, *, signal: int) -> int:
    """Bytes of a low-latency layout whose counters take ``signal`` bytes per expert."""
    scales = 4 * (hidden // 128)
    dispatch_msg = 16 + max(2 * hidden, hidden + scales)
    combine_msg = 2 * hidden + scales
    send = max(max_tokens * dispatch_msg, experts * max_tokens * combine_msg)
    recv = experts * max_tokens * max(dispatch_msg, combine_msg)
    total = 2 * (send + recv + ceil_to(signal * experts, 128))
    return (total + 128) // 128 * 128


def _batched_modes(facts: CapabilityFacts) -> frozenset[Mode]:
    """Mirror of the host's ``DeepEPMode.resolve``: ``auto`` batches decode only."""
    if facts.deepep_mode == "low_latency":
        return frozenset(Mode)
    if facts.deepep_mode == "auto" and facts.disaggregation_mode != "prefill":
        return frozenset({Mode.DECODE})
    return frozenset()


def low_latency_qp_depth(max_tokens: int) -> int:
    """Smallest ``NVSHMEM_QP_DEPTH`` that DeepEP accepts for ``max_tokens`` tokens per rank."""
    return 2 * (max_tokens + 1)


def device_bytes(rdma_bytes: int) -> int:
    """Bytes of device memory that a buffer takes: whole heap granules and the fixed cost."""
    return ceil_to(rdma_bytes, NVSHMEM_GRANULE) + NVSHMEM_FIXED_BYTES


DEEPEP_LIMITS = Limits(
    name="DeepEP low latency",
    max_tokens=1024,
    tokens_variable=TOKENS_VARIABLE,
    hidden_sizes=HIDDEN_SIZES,
    max_top_k=16,
    min_experts=2,
    max_buffer_bytes=16 * (2**31 - 1),
    buffer_bytes=low_latency_rdma_bytes,
    device_bytes=device_bytes,
    dtypes=frozenset({"bfloat16"}),
    max_free_ranks=7,
    rank_multiple=8,
    row_multiple=4,
    fp8_row_multiple=128,
    qp_depth=low_latency_qp_depth,
    default_qp_depth=1024,
    sources=(
        ("max_tokens", "FINISHED_SUM_TAG = 1024 (internode_ll.cu); host deepep.py:409"),
        ("hidden_sizes", "kernel names in the sgl-deep-ep 0.1.2.post1 binary"),
        ("max_top_k", "constants in the sgl-deep-ep 0.1.2.post1 binary"),
        ("min_experts", "at least two expert groups (internode_ll.cu)"),
        ("max_buffer_bytes", "num_rdma_bytes / 16 < 2**31 - 1 (buffer.hpp)"),
        ("buffer_bytes", "Buffer.get_low_latency_rdma_size_hint"),
        ("device_bytes", "512 MiB granules (legacy.py); fixed cost as measured"),
        ("dtypes", "x.scalar_type() == kBFloat16 (buffer.hpp)"),
        ("ranks", "num_ranks < 8 or num_ranks % 8 == 0 (buffer.hpp constructor)"),
        ("row_multiple", "(ranks * T) % 4 == 0, TMA (buffer.hpp)"),
        (
            "fp8_row_multiple",
            "sgl-deep-ep 0.1.2.post1 lays out an expert's FP8 scales in whole blocks of 128 rows, "
            "past the end of a tensor of ranks x T",
        ),
        ("qp_depth", "NVSHMEM_QP_DEPTH >= 2 * (T + 1) (legacy.py, every call)"),
    ),
)
TORCH_LIMITS = Limits(
    name="the torch transport",
    max_tokens=1024,
    tokens_variable=TOKENS_VARIABLE,
    dtypes=frozenset({"bfloat16", "float32"}),
    sources=(
        ("max_tokens", "assert in the host's DeepEP dispatcher, deepep.py:409"),
        ("dtypes", "transports/torch_dist.py"),
    ),
)
"""``torch.distributed`` behind the host's DeepEP dispatcher: development, tests, CPU."""

DEEPEP = BatchedBackend(
    name="deepep",
    batched_modes=_batched_modes,
    explicit_flag="--moe-a2a-backend deepep --deepep-mode low_latency",
    limits=DEEPEP_LIMITS,
    module="deep_ep",
    package="sgl-deep-ep",
)


def limits_of(backend: BatchedBackend, transport: str) -> Limits:
    """Limits that bind: the backend's own, or the torch transport's in DeepEP's place."""
    return TORCH_LIMITS if backend is DEEPEP and transport == "torch" else backend.limits
