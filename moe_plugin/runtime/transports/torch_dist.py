"""DeepEP's low-latency contract over ``torch.distributed``: gloo on CPU, NCCL on GPUs.

For development, tests and machines without DeepEP. Same shapes, same counts, same refusal of
more than T tokens; rows past the count are NaN on purpose, so that reading them shows.
bf16, fp16 and fp32 payloads; no FP8 quantisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ...errors import BudgetError, UnsupportedError, explain

# torch 2.14 renamed it and warns about the old name; SGLang 0.5.20 still pins torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Handle(NamedTuple):
    """What combine needs to know of its dispatch.

    Attributes:
        src_info: [L, R*T] int32, source token index of each received row (-1: no row).
        layout_range: [L, R] int64, first row << 32 | count, per source rank (as DeepEP packs it).
        num_max_tokens: T.
        hidden: H.
        num_experts: E.
        row_of_slot: [R*T, K] int64, flat received row of each (source token, k), or -1.
    """

    src_info: torch.Tensor
    layout_range: torch.Tensor
    num_max_tokens: int
    hidden: int
    num_experts: int
    row_of_slot: torch.Tensor


class _Done:
    """An event that already happened."""

    def current_stream_wait(self) -> None:
        """Nothing to wait for."""


def _nothing() -> None:
    pass


class TorchTransport:
    """See :class:`moe_plugin.runtime.transports.base.Transport` for the contract of every call.

    Args:
        group: the process group of the all-to-all ranks; every rank calls in the same order.
    """

    low_latency_mode = True

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.group_size = group.size()
        self.rank = group.rank()

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
    ) -> tuple[torch.Tensor, torch.Tensor, Handle, _Done, Callable[[], None]]:
        """All-gather every rank's tokens, then keep the rows of this rank's experts."""
        del async_finish, return_recv_hook, options
        max_tokens, ranks = num_max_dispatch_tokens_per_rank, self.group_size
        self._check(x, topk_idx, max_tokens, num_experts, use_fp8)
        local = num_experts // ranks
        tokens = self._gather_rows(x, max_tokens, 0)
        ids = self._gather_rows(topk_idx, max_tokens, -1)

        first = self.rank * local
        experts = torch.arange(first, first + local, device=ids.device)
        hits = (ids.unsqueeze(0) == experts.view(-1, 1, 1)).any(-1)  # [L, R*T]
        count = hits.sum(1, dtype=torch.int32)
        # A stable sort puts each expert's tokens first, in order of source rank and token.
        source = torch.argsort((~hits).to(torch.int8), dim=1, stable=True)
        live = torch.arange(ranks * max_tokens, device=x.device) < count.unsqueeze(1)
        recv = torch.where(live.unsqueeze(-1), tokens[source], torch.nan)

        row = hits.cumsum(1) - 1 + torch.arange(local, device=x.device).view(-1, 1) * len(ids)
        expert_of_slot = (ids - first).clamp(0, local - 1)
        owned = (ids >= first) & (ids < first + local)
        row_of_slot = torch.where(owned, row.T.gather(1, expert_of_slot), -1)

        per_rank = hits.view(local, ranks, max_tokens).sum(-1)
        begin = per_rank.cumsum(1) - per_rank
        handle = Handle(
            src_info=torch.where(live, source % max_tokens, -1).to(torch.int32),
            layout_range=(begin << 32) | per_rank,
            num_max_tokens=max_tokens,
            hidden=x.shape[1],
            num_experts=num_experts,
            row_of_slot=row_of_slot,
        )
        return recv, count, handle, _Done(), _nothing

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Handle,
        *,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, _Done, Callable[[], None]]:
        """Send each received row back to its (rank, token, k) slot and reduce there in fp32."""
        del async_finish, return_recv_hook, options
        ranks, max_tokens = self.group_size, handle.num_max_tokens
        n, top_k = topk_idx.shape
        slots = handle.row_of_slot
        owned = (slots >= 0).unsqueeze(-1)
        flat = x.reshape(-1, handle.hidden)
        send = torch.where(owned, flat[slots.clamp_min(0)], 0)  # [R*T, K, H]
        back = self._all_to_all(send.view(ranks, max_tokens, top_k, handle.hidden))
        owner = topk_idx.clamp_min(0) // (handle.num_experts // ranks)
        token = torch.arange(n, device=x.device).view(-1, 1)
        slot = torch.arange(top_k, device=x.device).view(1, -1)
        rows = back[owner, token, slot].float()  # [n, K, H]
        weights = torch.where(topk_idx >= 0, topk_weights.float(), 0)
        combined = torch.zeros((n, handle.hidden), device=x.device)
        for k in range(top_k):  # DeepEP sums over k in order, in fp32
            combined += weights[:, k : k + 1] * rows[:, k]
        result = combined.to(x.dtype)
        if out is not None:
            result = out.copy_(result)
        return result, _Done(), _nothing

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Nothing to clean: no state outlives a call."""

    def destroy(self) -> None:
        """Nothing to release; the process group is the caller's."""

    def _check(
        self, x: torch.Tensor, topk_idx: torch.Tensor, max_tokens: int, experts: int, use_fp8: bool
    ) -> None:
        if use_fp8:
            raise UnsupportedError(
                explain(
                    "dispatch dtype of the torch transport",
                    got="fp8",
                    allowed="bf16, fp16 or fp32",
                    fix="--deepep-dispatcher-output-dtype bf16, or the deepep transport",
                )
            )
        if x.shape[0] > max_tokens:
            raise BudgetError(
                explain(
                    "x.size(0) <= num_max_dispatch_tokens_per_rank",
                    got=f"{x.shape[0]} tokens",
                    allowed=f"<= {max_tokens}",
                    fix="--use-batched-dp-moe on, which bounds every batch, or a larger "
                    "--batched-dp-moe-max-tokens",
                )
            )
        if topk_idx.dtype != torch.int64:
            raise UnsupportedError(
                explain(
                    "dtype of topk_idx",
                    got=topk_idx.dtype,
                    allowed="torch.int64",
                    fix="topk_idx.to(torch.int64)",
                )
            )
        if experts % self.group_size:
            raise UnsupportedError(
                explain(
                    "number of experts",
                    got=experts,
                    allowed=f"a multiple of {self.group_size} ranks",
                    fix="change the number of ranks or of redundant experts",
                )
            )

    def _gather_rows(self, rows: torch.Tensor, max_tokens: int, fill: int) -> torch.Tensor:
        """[n, C] on each rank -> [R * max_tokens, C] on all, missing rows = ``fill``."""
        padded = rows.new_full((max_tokens, rows.shape[1]), fill)
        padded[: rows.shape[0]] = rows
        gathered = rows.new_empty((self.group_size * max_tokens, rows.shape[1]))
        _all_gather(_bytes(gathered), _bytes(padded), group=self.group)
        return gathered

    def _all_to_all(self, blocks: torch.Tensor) -> torch.Tensor:
        """[R, ...]: block r goes to rank r; block r of the result came from rank r."""
        blocks = blocks.contiguous()
        received = torch.empty_like(blocks)
        dist.all_to_all_single(_bytes(received), _bytes(blocks), group=self.group)
        return received


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: collectives differ in the dtypes that they know."""
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)
