"""The guard at the point of use: no more than T tokens enter a dispatch, on any rank.

The libraries' own check is an assert on the one rank that is over; its peers then wait for it
until they time out. Where the host knows every rank's tokens, all ranks raise the same error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import BudgetError, explain
from ..metadata import DPMetadata
from ..stats import STATS, Stats

if TYPE_CHECKING:
    import torch

    from .base import Hook, Transport


def check_tokens(tokens: int, max_num_tokens: int, where: str, stats: Stats = STATS) -> None:
    """Refuse more than T tokens in one dispatch, and count that in ``stats``.

    Raises:
        BudgetError: ``tokens`` exceed ``max_num_tokens``; ``where`` says on which rank.
    """
    if tokens > max_num_tokens:
        stats.record_refusal()
        raise BudgetError(
            explain(
                "tokens in one all-to-all dispatch (n <= T)",
                got=f"{tokens} {where}",
                allowed=f"<= {max_num_tokens}",
                fix="resolve the arguments with the plugin loaded so that budgets are "
                "planned, or raise --batched-dp-moe-max-tokens",
            )
        )


class RowGuard:
    """Refuses batches above T, before anything is sent, and records what passes.

    Args:
        max_num_tokens: T.
        metadata: () -> tokens per rank in the current forward, or None when unknown.
        mode: () -> name of the current forward mode, for the record.
        stats: where rows are recorded.
    """

    def __init__(
        self,
        max_num_tokens: int,
        *,
        metadata: Callable[[], DPMetadata | None] = lambda: None,
        mode: Callable[[], str] = lambda: "all",
        stats: Stats = STATS,
    ) -> None:
        self.max_num_tokens = max_num_tokens
        self._metadata = metadata
        self._mode = mode
        self._stats = stats

    def check(self, rows: int) -> None:
        """Let a dispatch of ``rows`` tokens of this rank pass.

        Raises:
            BudgetError: this rank, or another one in this forward, has more than T.
        """
        metadata = self._metadata()
        busiest = max(rows, metadata.max_tokens if metadata is not None else 0)
        where = "on this rank" if rows == busiest else "on the busiest rank"
        check_tokens(busiest, self.max_num_tokens, where, self._stats)
        self._stats.record_rows(self._mode(), rows, busiest)


class GuardedTransport(RowGuard):
    """A transport behind a guard.

    Args:
        inner: the transport that moves the tokens; every other attribute is its own.
        max_num_tokens: T. This and the rest as in :class:`RowGuard`.
    """

    def __init__(
        self,
        inner: Transport,
        max_num_tokens: int,
        *,
        metadata: Callable[[], DPMetadata | None] = lambda: None,
        mode: Callable[[], str] = lambda: "all",
        stats: Stats = STATS,
    ) -> None:
        super().__init__(max_num_tokens, metadata=metadata, mode=mode, stats=stats)
        self.inner = inner

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        **options: Any,
    ) -> tuple[Any, torch.Tensor, Any, Any, Hook]:
        """As the inner transport's, after the check, and counted like the combine."""
        self.check(x.shape[0])
        self._stats.dispatches += 1
        return self.inner.low_latency_dispatch(
            x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, **options
        )

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, Any, Hook]:
        """As the inner transport's, counted."""
        self._stats.combines += 1
        return self.inner.low_latency_combine(x, topk_idx, topk_weights, handle, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
