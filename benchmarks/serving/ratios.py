"""Paired ratios of rounds, with Student's 95 % intervals of their logarithms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import mean, variance
from typing import Any

# Two-sided 95 % quantiles of Student's t for 1 ... 30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

Round = dict[str, Any]


def quantile(freedom: float) -> float:
    """Student's two-sided 95 % quantile; never below the true one."""
    if freedom < 1:
        return math.inf
    if freedom >= 31:
        return 2.042 if freedom < 61 else 2.0 if freedom < 121 else 1.98
    return _T95[int(freedom) - 1]


def by_round(rounds: Iterable[Round], variant: str, point: int, metric: str) -> dict[str, float]:
    """A variant's values at one concurrency, by the key that its rivals' rounds share."""
    return {
        r["key"]: r[metric]
        for r in rounds
        if r["variant"] == variant and r["concurrency"] == point and r.get(metric)
    }


def paired(rounds: Sequence[Round], one: str, other: str, point: int, metric: str) -> list[float]:
    """Ratios one / other of the rounds that both ran.

    A round without a token has none; its requests are among the lost ones (:mod:`load`).
    """
    ones, others = (by_round(rounds, name, point, metric) for name in (one, other))
    return [ones[key] / others[key] for key in ones if key in others]


def consecutive(rounds: Sequence[Round], variant: str, point: int, metric: str) -> list[float]:
    """Each round of a variant over its previous one: what nothing but chance changes."""
    values = list(by_round(rounds, variant, point, metric).values())
    return [after / before for before, after in pairwise(values)]


def interval(ratios: Sequence[float]) -> dict[str, Any] | None:
    """Geometric mean and its 95 % interval; the interval is open with fewer than two ratios."""
    if not ratios:
        return None
    logs = [math.log(ratio) for ratio in ratios]
    centre = mean(logs)
    spread = math.inf
    if len(logs) > 1:
        spread = quantile(len(logs) - 1) * math.sqrt(variance(logs) / len(logs))
    return _bounds(centre, spread, len(logs))


def together(groups: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """Geometric mean over points that weigh the same, each with its own scatter (Welch)."""
    logs = [[math.log(ratio) for ratio in group] for group in groups if group]
    if not logs:
        return None
    centre = mean(mean(group) for group in logs)
    count = sum(len(group) for group in logs)
    if any(len(group) < 2 for group in logs):
        return _bounds(centre, math.inf, count)
    parts = [variance(group) / len(group) / len(logs) ** 2 for group in logs]
    total = sum(parts)
    if total == 0:
        return _bounds(centre, 0.0, count)
    freedom = total**2 / sum(p**2 / (len(g) - 1) for p, g in zip(parts, logs, strict=True))
    return _bounds(centre, quantile(freedom) * math.sqrt(total), count)


def _bounds(centre: float, spread: float, count: int) -> dict[str, Any]:
    open_ended = math.isinf(spread)
    return {
        "ratio": round(math.exp(centre), 4),
        "low": None if open_ended else round(math.exp(centre - spread), 4),
        "high": None if open_ended else round(math.exp(centre + spread), 4),
        "n": count,
    }
