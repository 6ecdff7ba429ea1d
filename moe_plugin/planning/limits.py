"""What a batched backend can carry: limits as data, each with its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, lcm

DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP = 256
HOST_TOKENS_PER_RANK = 128
"""T of the host where a backend's variable for it is not set; the same for all of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one batched all-to-all implementation. ``None`` means unlimited.

    Attributes:
        name: who sets these limits, for messages.
        default_max_tokens: tokens per rank planned when the user names none.
        max_tokens: largest tokens per rank.
        tokens_variable: the host's environment variable for tokens per rank, or None.
        hidden_sizes: supported hidden sizes.
        max_top_k: largest number of experts per token.
        min_experts: fewest physical experts.
        max_buffer_bytes: exclusive bound of the communication buffer, bytes per rank.
        buffer_bytes: (tokens per rank, hidden, ranks, experts) -> bytes per rank.
        device_bytes: buffer bytes -> bytes that the device really loses.
        dtypes: activation dtypes that may be dispatched, by torch name.
        max_free_ranks: any rank count up to this one works; above, see ``rank_multiple``.
        rank_multiple: multiple that larger rank counts must have.
        row_multiple: ranks * tokens per rank must be a multiple of this,
        fp8_row_multiple: and of this where rows are dispatched in FP8.
        qp_depth: tokens per rank -> queue-pair depth that the transport needs.
        default_qp_depth: the transport's queue-pair depth when nothing is set.
        sources: limit name -> where it was read or measured.
    """

    name: str = ""
    default_max_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP
    max_tokens: int | None = None
    tokens_variable: str | None = None
    hidden_sizes: frozenset[int] | None = None
    max_top_k: int | None = None
    min_experts: int = 1
    max_buffer_bytes: int | None = None
    buffer_bytes: Callable[[int, int, int, int], int] | None = None
    device_bytes: Callable[[int], int] | None = None
    dtypes: frozenset[str] | None = None
    max_free_ranks: int | None = None
    rank_multiple: int = 1
    row_multiple: int = 1
    fp8_row_multiple: int = 1
    qp_depth: Callable[[int], int] | None = None
    default_qp_depth: int = 0
    sources: tuple[tuple[str, str], ...] = ()

    def source(self, limit: str) -> str:
        """Where ``limit`` was read or measured; empty when nothing was recorded."""
        return dict(self.sources).get(limit, "")

    def ranks_ok(self, ranks: int) -> bool:
        """Whether a group of ``ranks`` ranks can be formed."""
        if self.max_free_ranks is None or ranks <= self.max_free_ranks:
            return True
        return ranks % self.rank_multiple == 0

    def token_multiple(self, ranks: int, multiple: int, *, fp8: bool) -> int:
        """What tokens per rank must be a multiple of: of ``multiple``, and by the rows' sake."""
        rows = lcm(self.row_multiple, self.fp8_row_multiple) if fp8 else self.row_multiple
        return lcm(multiple, rows // gcd(rows, ranks))

    def largest_tokens(self, hidden: int, ranks: int, experts: int, multiple: int) -> int:
        """Largest tokens per rank, a multiple of ``multiple``, within every limit; 0 if none."""
        top = self.max_tokens if self.max_tokens is not None else 1 << 20
        top = top // multiple * multiple
        if self.buffer_bytes is None or self.max_buffer_bytes is None:
            return top
        low, high = 0, top // multiple
        while low < high:  # the buffer grows with the tokens: bisect
            middle = (low + high + 1) // 2
            size = self.buffer_bytes(middle * multiple, hidden, ranks, experts)
            low, high = (middle, high) if size < self.max_buffer_bytes else (low, middle - 1)
        return low * multiple
