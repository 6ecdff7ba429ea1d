"""What a round received between two points in time, and the figures that are kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy

PERCENTILES = (50, 95, 99)


@dataclass
class Counts:
    """What was received between the two points in time.

    Attributes:
        tokens: output tokens.
        prompt_tokens: of the requests whose first token came; cached ones count as well.
        done: requests that ended, complete.
        lost: requests that failed or ended short, at any time; and those that had heard nothing
            for longer than their load's patience when the round was over.
        waiting: requests without a token when the round was over.
        first_s: time to first token of requests sent within; of those that were still waiting, the
            time that they had waited.
        between_s: time per token of each stream, between its first and last event within.
        gaps_s: time between two events within, per token of the later one.
        error: of one lost request.
    """

    tokens: int = 0
    prompt_tokens: int = 0
    done: int = 0
    lost: int = 0
    waiting: int = 0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    error: str = ""

    def add(self, other: Counts) -> None:
        """Another process's counts."""
        self.tokens += other.tokens
        self.prompt_tokens += other.prompt_tokens
        self.done += other.done
        self.lost += other.lost
        self.waiting += other.waiting
        self.first_s += other.first_s
        self.between_s += other.between_s
        self.gaps_s += other.gaps_s
        self.error = self.error or other.error

    def figures(self, seconds: float) -> dict[str, Any]:
        """Rates, and milliseconds: medians, and percentiles of first tokens and of gaps."""
        return {
            "tokens_per_s": self.tokens / seconds,
            "total_tokens_per_s": (self.tokens + self.prompt_tokens) / seconds,
            "ttft_ms": 1e3 * median(self.first_s) if self.first_s else None,
            "itl_ms": 1e3 * median(self.between_s) if self.between_s else None,
            **_percentiles("ttft", self.first_s),
            **_percentiles("itl", self.gaps_s),
            "first_tokens": len(self.first_s),
            "done": self.done,
            "lost": self.lost,
            "waiting": self.waiting,
            **({"error": self.error} if self.error else {}),
        }


def _percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = numpy.percentile(values, PERCENTILES)
    return {f"{name}_p{p}_ms": 1e3 * float(v) for p, v in zip(PERCENTILES, found, strict=True)}
