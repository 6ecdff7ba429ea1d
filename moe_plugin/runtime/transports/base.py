"""The transport seam: the part of DeepEP's low-latency ``Buffer`` that dispatchers call.

Source of the contract: DeepEP v1 ``deep_ep/buffers/legacy.py``. Symbols: n tokens of this rank,
T tokens per rank at most, R ranks, E global experts, L = E / R local experts, H hidden, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    Hook = Callable[[], None]


class Transport(Protocol):
    """Moves tokens to their experts' ranks and back.

    Attributes:
        group_size: ranks of the group, R.
        low_latency_mode: always True; hosts read it before cleaning the buffer.
    """

    group_size: int
    low_latency_mode: bool

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        *,
        use_fp8: bool = True,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        **options: Any,
    ) -> tuple[Any, torch.Tensor, Any, Any, Hook]:
        """Send each token to the ranks of its experts. Collective over the group.

        Args:
            x: [n, H], n <= T, contiguous; alive and unwritten until the returned hook ran.
            topk_idx: [n, K] int64 global physical ids; -1 = no expert.
            num_max_dispatch_tokens_per_rank: T, equal on all ranks.
            num_experts: E.
            use_fp8: quantise to float8_e4m3fn with one float32 scale per 128 channels.
            async_finish: return an event instead of finishing on the current stream.
            return_recv_hook: only send; nothing may be read before ``hook()``, and no other
                dispatch or combine may be sent: a send clears the other buffer's arrival
                counters, so that this receive would wait for ever.

        Returns:
            ``(recv, recv_count, handle, event, hook)``. recv: [L, R*T, H], or (data, scales) with
            scales [L, R*T, H/128] column-major; only rows ``[e, :recv_count[e]]`` are valid, the
            rest may be NaN. recv_count: [L] int32. handle: for exactly one combine.
        """
        ...

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Any,
        *,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, Any, Hook]:
        """Bring experts' rows back: ``out[t] = sum_k topk_weights[t, k] * y_k[t]`` in fp32.

        Args:
            x: [L, R*T, H]; rows past the count are not read.
            topk_idx: the tensor given to dispatch.
            topk_weights: [n, K] float32.
            handle: of the matching dispatch.

        Returns:
            ``(combined [n, H], event, hook)``; tokens without any expert come back as zeros.
        """
        ...

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Reset the buffer after other use; a no-op where there is nothing to reset."""
        ...

    def destroy(self) -> None:
        """Release the buffer. Collective; the transport must not be used afterwards."""
        ...
