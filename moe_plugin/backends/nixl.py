"""NIXL EP: DeepEP's low-latency kernels over NIXL, with their output format and limits."""

from __future__ import annotations

from ..batched_backend import BatchedBackend, unless_normal
from ..planning.limits import Limits
from .deepep import layout_bytes

WORKSPACE = 32 << 20


def buffer_bytes(max_tokens: int, hidden: int, ranks: int, experts: int) -> int:
    """Bytes per rank; equals ``nixl_ep.Buffer.get_rdma_size_hint``. ``ranks`` has no influence.

    With elastic EP (``--max-ep-size``) the host asks for more experts than it has: not counted.
    """
    del ranks
    return layout_bytes(max_tokens, hidden, experts, signal=8)


def device_bytes(rdma_bytes: int) -> int:
    """The buffer and NIXL EP's workspace. What UCX takes beside them was not measured."""
    return rdma_bytes + WORKSPACE


NIXL = BatchedBackend(
    name="nixl",
    batched_modes=unless_normal,
    explicit_flag="--moe-a2a-backend nixl --deepep-mode low_latency",
    limits=Limits(
        name="NIXL EP",
        max_tokens=1024,
        tokens_variable="SGLANG_NIXL_EP_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
        hidden_sizes=frozenset({2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192}),
        max_top_k=16,
        buffer_bytes=buffer_bytes,
        device_bytes=device_bytes,
        dtypes=frozenset({"bfloat16"}),
        max_free_ranks=7,
        rank_multiple=8,
        row_multiple=4,
        sources=(
            ("max_tokens", "assert in the host's token_dispatcher/nixl.py; FINISHED_SUM_TAG"),
            ("hidden_sizes", "kernel names in the nixl-cu13 1.5.1 binary"),
            ("max_top_k", "kNumMaxTopK in nixl_ep_ll.cu"),
            ("buffer_bytes", "EPLayout in config.hpp of NIXL EP"),
            ("device_bytes", "NUM_WORKSPACE_BYTES in configs.cuh; UCX not measured"),
            ("dtypes", "x.scalar_type() == kBFloat16 (nixl_ep.cpp)"),
            ("ranks", "num_ranks < 8 or num_ranks % 8 == 0 (Buffer::init in nixl_ep.cpp)"),
            ("row_multiple", "(ranks * T) % 4 == 0, TMA (nixl_ep.cpp)"),
        ),
    ),
    module="nixl_ep",
    package="nixl",
    low_latency_only=True,
    bf16_variable="SGLANG_NIXL_EP_BF16_DISPATCH",
)
