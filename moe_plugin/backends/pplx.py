"""pplx-kernels: a masked layout of DP groups x T rows, for the host's DeepGEMM alone."""

from __future__ import annotations

from ..batched_backend import BatchedBackend, unless_normal
from ..planning.integers import ceil_to
from ..planning.limits import Limits

ONE_HOST = 8
"""Ranks up to which the kernels within one host are taken to be used."""


def buffer_bytes(max_tokens: int, hidden: int, ranks: int, experts: int) -> int:
    """Bytes per rank of the kernels' own buffers, for a bf16 dispatch.

    Within one host there is one buffer per peer, the larger of dispatch and fp32 combine; between
    hosts each has its own, and combine one for every expert, here with one rank per DP group.
    """
    local = -(-experts // ranks)
    rows = local * max_tokens
    dispatch_row, combine_row = ceil_to(2 * hidden + 4, 16), ceil_to(4 * hidden, 16)
    if ranks <= ONE_HOST:
        peer = 16 + ceil_to(4 * local, 16) + rows * max(dispatch_row, combine_row)
        return ranks * (peer + 6 * 4 * rows)
    batch = ranks * rows
    sent = (max_tokens + batch) * dispatch_row
    return sent + (batch + max_tokens * experts) * combine_row + 5 * 4 * batch


PPLX = BatchedBackend(
    name="pplx",
    batched_modes=unless_normal,
    explicit_flag="--moe-a2a-backend pplx --deepep-mode low_latency",
    limits=Limits(
        name="pplx-kernels",
        tokens_variable="SGLANG_PPLX_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
        buffer_bytes=buffer_bytes,
        dtypes=frozenset({"bfloat16"}),
        sources=(
            ("max_tokens", "none in pplx-kernels; the host compares chunk and graph with T"),
            ("buffer_bytes", "constructors in intranode.cpp and internode.cpp of pplx-kernels"),
            ("host_formats", "rows in bf16 or FP8: _PplxDispatcherImpl.set_dispatch_dtype"),
            ("dtypes", "FP8 rows are quantised from bf16 (the host's token_dispatcher/pplx.py)"),
        ),
    ),
    module="pplx_kernels",
    package="pplx-kernels",
    low_latency_only=True,
    host_formats=frozenset({"unquantized", "fp8_block", "fp8_tensor", "fp8_fp4", "mxfp4"}),
    whole_rows=True,
)
