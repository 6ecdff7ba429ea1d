"""A transport that compares each call with those of the other ranks before it is made."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

KINDS = ("dispatch", "combine", "end of a step")


class CallsDiffer(AssertionError):
    """The ranks were about to make different calls; raised on every rank at the same one."""


class CountingTransport:
    """Every rank of an all-to-all makes the same calls in the same order, or all of them raise.

    A rank that makes fewer calls than the others in a step would leave them waiting. Here it tells
    them of the end of its step where they tell of a call, so that the difference is seen when the
    next of them is due and nobody waits.

    Args:
        inner: the transport; every rank wraps its own.
        group: its process group.
    """

    def __init__(self, inner: Any, group: dist.ProcessGroup) -> None:
        self.inner = inner
        self.calls = 0
        self._group = group

    def low_latency_dispatch(
        self, x: Any, topk_idx: Any, capacity: int, experts: int, **options: Any
    ) -> Any:
        """As the inner transport's, if all ranks dispatch with the same T and experts."""
        self._agree("dispatch", capacity, experts)
        return self.inner.low_latency_dispatch(x, topk_idx, capacity, experts, **options)

    def low_latency_combine(self, *args: Any, **options: Any) -> Any:
        """As the inner transport's, if all ranks combine."""
        self._agree("combine")
        return self.inner.low_latency_combine(*args, **options)

    def end_step(self) -> None:
        """Collective: all ranks are at the end of a step."""
        self._agree("end of a step")

    def _agree(self, kind: str, capacity: int = 0, experts: int = 0) -> None:
        self.calls += 1
        mine = torch.tensor([self.calls, KINDS.index(kind), capacity, experts])
        theirs = [torch.empty_like(mine) for _ in range(self._group.size())]
        dist.all_gather(theirs, mine, group=self._group)
        if any(not torch.equal(one, mine) for one in theirs):
            told = "; ".join(
                f"rank {rank}: call {number}, {KINDS[what]}, T {tokens}, {among} experts"
                for rank, (number, what, tokens, among) in enumerate(t.tolist() for t in theirs)
            )
            raise CallsDiffer(told)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
