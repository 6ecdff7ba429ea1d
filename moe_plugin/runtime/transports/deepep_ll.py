"""DeepEP's low-latency buffer. The only file that imports deep_ep."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

from ...backends.deepep import DEEPEP_LIMITS, low_latency_rdma_bytes
from ...errors import BudgetError, UnsupportedError, explain

if TYPE_CHECKING:
    import torch.distributed as dist

_QP_DEPTH = "NVSHMEM_QP_DEPTH"


@cache
def refusing_fp8_rows(buffer: type) -> type:
    """``deep_ep.Buffer``, refusing the FP8 dispatch that it gets wrong without saying so.

    Its kernel computes where an expert's scales begin from ranks * T rounded up to 128 rows, in a
    tensor of ranks * T: unless these agree, scales are misplaced and written past its end.
    """

    class Fp8RowsBuffer(buffer):
        def low_latency_dispatch(
            self, x: Any, topk_idx: Any, num_max_dispatch_tokens_per_rank: int, num_experts: int,
            *args: Any, use_fp8: bool = True, **options: Any,
        ) -> Any:  # fmt: skip
            tokens, ranks = num_max_dispatch_tokens_per_rank, self.group_size
            if use_fp8 and ranks * tokens % DEEPEP_LIMITS.fp8_row_multiple:
                multiple = DEEPEP_LIMITS.token_multiple(ranks, 1, fp8=True)
                raise BudgetError(
                    explain(
                        "tokens per rank of an FP8 dispatch",
                        got=f"{tokens} on {ranks} ranks",
                        allowed=f"a multiple of {multiple} "
                        f"({DEEPEP_LIMITS.source('fp8_row_multiple')})",
                        fix="such a --batched-dp-moe-max-tokens, or use_fp8=False",
                    )
                )
            return super().low_latency_dispatch(
                x, topk_idx, tokens, num_experts, *args, use_fp8=use_fp8, **options
            )

    return Fp8RowsBuffer


def create_deepep_buffer(
    group: dist.ProcessGroup,
    *,
    max_num_tokens: int,
    hidden_size: int,
    num_experts: int,
    qp_depth: int,
    allow_mnnvl: bool = False,
    explicitly_destroy: bool = True,
) -> Any:
    """Create ``deep_ep.Buffer`` for low latency, sized for exactly the plan. Collective.

    Args:
        group: all-to-all ranks; every rank constructs at the same point.
        max_num_tokens: T. For FP8 dispatch the ranks times T must be a multiple of 128, see
            :func:`refusing_fp8_rows`.
        hidden_size: H.
        num_experts: physical experts, E.
        qp_depth: written to ``NVSHMEM_QP_DEPTH``, which the constructor fixes for good;
            DeepEP asserts ``>= 2 * (T + 1)`` at the first dispatch otherwise.
        allow_mnnvl: multi-node NVLink.
        explicitly_destroy: the caller calls ``destroy()`` on every rank; otherwise the
            destructor does, which suits a server process that ends by exiting.

    Returns:
        The buffer; it satisfies :class:`~.base.Transport` and lives outside torch's allocator.

    Raises:
        UnsupportedError: deep_ep does not import here.
    """
    try:
        from deep_ep import Buffer
    except Exception as error:  # its import-time checks raise more than ImportError
        raise UnsupportedError(
            explain(
                "DeepEP",
                got=f"deep_ep does not import: {error}",
                allowed="an importable deep_ep",
                fix="install sgl-deep-ep for this CUDA and NCCL, or set "
                "MOE_PLUGIN_TRANSPORT=torch (slow, for development)",
            )
        ) from error
    os.environ[_QP_DEPTH] = str(qp_depth)
    ranks = group.size()
    hint = Buffer.get_low_latency_rdma_size_hint(max_num_tokens, hidden_size, ranks, num_experts)
    planned = low_latency_rdma_bytes(max_num_tokens, hidden_size, ranks, num_experts)
    if hint > planned:
        raise UnsupportedError(
            explain(
                "DeepEP's buffer size",
                got=f"{hint} bytes by this DeepEP",
                allowed=f"{planned} bytes as planned",
                fix="use the sgl-deep-ep that this SGLang pins",
            )
        )
    return refusing_fp8_rows(Buffer)(
        group,
        num_nvl_bytes=0,
        num_rdma_bytes=hint,
        low_latency_mode=True,
        num_qps_per_rank=num_experts // ranks,
        allow_mnnvl=allow_mnnvl,
        explicitly_destroy=explicitly_destroy,
    )
