"""What a batched backend can carry: limits as data, each with its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one batched all-to-all implementation. ``None`` means unlimited.

    Attributes:
        default_max_tokens: tokens per rank planned when the user names none.
        max_tokens: largest tokens per rank.
        capacity_variable: the host's environment variable for tokens per rank, or None.
        hidden_sizes: supported hidden sizes.
        max_top_k: largest number of experts per token.
        max_buffer_bytes: exclusive bound of the communication buffer, bytes per rank.
        buffer_bytes: (tokens per rank, hidden, ranks, experts) -> bytes per rank.
        dtypes: activation dtypes that may be dispatched, by torch name.
        sources: limit name -> where it was read or measured.
    """

    default_max_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP
    max_tokens: int | None = None
    capacity_variable: str | None = None
    hidden_sizes: frozenset[int] | None = None
    max_top_k: int | None = None
    max_buffer_bytes: int | None = None
    buffer_bytes: Callable[[int, int, int, int], int] | None = None
    dtypes: frozenset[str] | None = None
    sources: tuple[tuple[str, str], ...] = ()
