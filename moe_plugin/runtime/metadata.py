"""Data-parallel metadata: how many tokens each all-to-all rank dispatches in this forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..planning.integers import ceil_div
from .config import BatchedMoEConfig


@dataclass(frozen=True, slots=True)
class DPMetadata:
    """Tokens per all-to-all rank in one forward; the same on every rank, where each knows them.

    Attributes:
        sp_local_sizes: one entry per rank: the tokens that it dispatches after its data-parallel
            group's tokens were scattered over attention TP (sequence parallel).
    """

    sp_local_sizes: tuple[int, ...]

    @classmethod
    def from_global_num_tokens(
        cls, global_num_tokens: Sequence[int], attn_tp_size: int, ranks: int = 0
    ) -> DPMetadata:
        """From the host's tokens per attention-DP group (``global_num_tokens_cpu``).

        Where it holds too few groups for ``ranks``, because the host told each group its own tokens
        only, the other ranks are taken to hold as many as the busiest known one.
        """
        return _scattered(tuple(map(int, global_num_tokens)), attn_tp_size, ranks)

    @property
    def max_tokens(self) -> int:
        """Largest dispatch of any rank: what must not exceed T."""
        return max(self.sp_local_sizes, default=0)

    def expected_rows(self, top_k: int, num_experts: int) -> int:
        """Mean live rows per expert, at least 1: for the choice of tiles, never correctness."""
        return max(1, ceil_div(sum(self.sp_local_sizes) * top_k, num_experts))


def rows_to_launch_for(
    metadata: DPMetadata | None, own_tokens: int, config: BatchedMoEConfig
) -> tuple[int, int]:
    """Mean live rows per expert for which a launch of the experts is chosen, at least 1; and how
    many may come besides.

    The one place where that is decided: for eager steps, and for what is captured. Where the host
    does not say what the other ranks hold, because each group decides for itself, they are taken to
    hold as many as this one. So a launch depends on the group's own batch alone, and a request gets
    the same bits whatever the others do. A decode graph is also replayed while others prefill, when
    its experts have many times these rows: it is captured for a launch that is good for both,
    unless so few experts have rows at all that the narrow tiles of the fewest rows count.

    Args:
        metadata: tokens per rank, where the host knows them.
        own_tokens: tokens that this rank dispatches, padded ones included.
        config: the layer's shape, and who else may prefill: with up to T tokens each.
    """
    known = metadata or DPMetadata((own_tokens,) * config.num_ranks)
    rows = known.expected_rows(config.top_k, config.num_experts)
    few_experts_live = sum(known.sp_local_sizes) * config.top_k < config.num_experts
    if config.other_ranks == 0 or few_experts_live:
        return rows, 0
    others = DPMetadata((config.max_num_tokens,) * config.other_ranks)
    return rows, others.expected_rows(config.top_k, config.num_experts)


@lru_cache(maxsize=64)  # every layer of a forward asks for the same
def _scattered(tokens_of_groups: tuple[int, ...], attn_tp_size: int, ranks: int) -> DPMetadata:
    sizes: list[int] = []
    for tokens in tokens_of_groups:
        sizes += [ceil_div(tokens, attn_tp_size)] * attn_tp_size
    if len(sizes) < ranks:
        sizes = [max(sizes, default=0)] * ranks
    return DPMetadata(tuple(sizes))
