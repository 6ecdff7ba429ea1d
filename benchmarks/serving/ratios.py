"""Paired ratios of rounds, with Student's 95 % intervals of their logarithms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import mean, median, variance
from typing import Any

from scipy import stats

Round = dict[str, Any]


def quantile(freedom: float) -> float:
    """Student's two-sided 95 % quantile."""
    return float(stats.t.ppf(0.975, freedom)) if freedom > 0 else math.inf


def point_of(row: Round) -> str:
    """Where a round was measured; the first records have one load, and name its requests."""
    return str(row.get("point") or f"short/{row['concurrency']}")


def points_of(rounds: Iterable[Round]) -> list[str]:
    """Points of all rounds, as they first occur."""
    return list(dict.fromkeys(point_of(row) for row in rounds))


def by_round(rounds: Iterable[Round], variant: str, point: str, metric: str) -> dict[str, float]:
    """A variant's values at one concurrency, by the key that its rivals' rounds share."""
    return {
        r["key"]: r[metric]
        for r in rounds
        if r["variant"] == variant and point_of(r) == point and r.get(metric)
    }


def paired(rounds: Sequence[Round], one: str, other: str, point: str, metric: str) -> list[float]:
    """Ratios one / other of the rounds that both ran.

    A round without a token has none; its requests are among the lost ones (:mod:`load`).
    """
    ones, others = (by_round(rounds, name, point, metric) for name in (one, other))
    return [ones[key] / others[key] for key in ones if key in others]


def best(
    rounds: Sequence[Round], names: Iterable[str], point: str, metric: str, *, most: bool
) -> str | None:
    """Of these variants the one with the best median at a point; None where none ran."""
    medians = {
        name: median(values)
        for name in names
        if (values := by_round(rounds, name, point, metric).values())
    }
    if not medians:
        return None
    return (max if most else min)(medians, key=lambda name: medians[name])


def consecutive(rounds: Sequence[Round], variant: str, point: str, metric: str) -> list[float]:
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
