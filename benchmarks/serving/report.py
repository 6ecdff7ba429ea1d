"""From partial results to one: joined, and ours held against the stock host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bars import bars
from ratios import Round, best, consecutive, interval, paired, points_of, together
from variants import OURS, STOCK_DP, STOCK_TP

METRICS = {
    "tokens_per_s": True, "total_tokens_per_s": True,
    "ttft_ms": False, "ttft_p95_ms": False, "ttft_p99_ms": False,
    "itl_ms": False, "itl_p95_ms": False, "itl_p99_ms": False,
}  # fmt: skip
"""Of a round, and whether more is better."""
LISTS = (
    "commands",
    "startup",
    "rounds",
    "served",
    "compiled",
    "failed",
    "client",
    "skipped",
    "traces",
)
BEST = {"best": STOCK_DP, "tp": STOCK_TP}
"""Rivals that are the best of several at each point, and for each metric."""

Report = dict[str, Any]


def merge(parts: Iterable[Report]) -> Report:
    """One report of several commands' results: lists joined, the rest by the last word.

    Raises:
        ValueError: the parts come from different devices, versions or models.
    """
    merged: Report = {}
    for part in parts:
        fixed = {k: v for k, v in part.get("environment", {}).items() if k != "date"}
        fixed |= {"model": part.get("model"), "gpus": part.get("gpus", 1)}
        if merged.setdefault("_fixed", fixed) != fixed:
            raise ValueError(f"not of one machine and model: {merged['_fixed']} and {fixed}")
        for key, value in part.items():
            if key in LISTS:
                merged.setdefault(key, []).extend(value)
            elif isinstance(value, dict):
                _join(merged.setdefault(key, {}), value)
            elif key != "summary":
                merged[key] = value
    merged.pop("_fixed", None)
    return merged | {"summary": summary(merged)}


def _join(into: Report, more: Report) -> None:
    """One table into another, table by table."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _join(into[key], value)
        else:
            into[key] = value


def summary(report: Report) -> Report:
    """Ratios of ours over each stock variant and over the best ones; the stock variants' bands,
    that is what nothing but chance changes; and the bars."""
    rounds: Sequence[Round] = report.get("rounds", [])
    points = points_of(rounds)
    names = sorted({r["variant"] for r in rounds})
    ours = [name for name in names if name[0] in OURS]
    stock = [name for name in names if name not in ours]
    ratios = {
        f"{name}/{rival}": {
            metric: _against(rounds, name, rivals, points, metric) for metric in METRICS
        }
        for name in ours
        for rival, rivals in {**{s: (s,) for s in stock}, **BEST}.items()
        if set(rivals) & set(stock)
    }
    bands = {
        f"band_{name}": {
            metric: {
                point: [round(min(found), 4), round(max(found), 4)]
                for point in points
                if (found := consecutive(rounds, name, point, metric))
            }
            for metric in METRICS
        }
        for name in stock
    }
    return {"ratios": ratios, **bands, "bars": list(bars(report, ratios))}


def _against(
    rounds: Sequence[Round], name: str, rivals: Sequence[str], points: Sequence[str], metric: str
) -> Report:
    """Paired ratios at each point, and over all points together."""
    found: Report = {}
    groups = []
    for point in points:
        rival = best(rounds, rivals, point, metric, most=METRICS[metric])
        ratios = paired(rounds, name, rival, point, metric) if rival else []
        row = interval(ratios)
        # Of one rival there is nothing to say.
        found[point] = row | {"of": rival} if row and len(rivals) > 1 else row
        groups.append(ratios)
    return found | {"together": together(groups)}
