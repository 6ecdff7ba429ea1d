"""A report as a short table: medians by point and variant, starts, and the bars."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from ratios import point_of, points_of

Report = dict[str, Any]

LATENCIES = ("ttft_ms", "ttft_p95_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p95_ms", "itl_p99_ms")


def table(report: Report) -> str:
    """Everything that a command found out, in lines."""
    lines = [*_rounds(report), *_ratios(report), *_starts(report)]
    if distances := report.get("logprob_distance"):
        lines.append(f"mean |logprob difference|: {distances}")
    for bar in report.get("summary", {}).get("bars", []):
        lines.append(f"{'ok  ' if bar['ok'] else 'MISS'} {bar['bar']}: {bar['value']}")
    lines += [f"skipped {line}" for line in report.get("skipped", [])]
    lines += [f"FAILED {line}"[:600] for line in report.get("failed", [])]
    return "\n".join(lines)


def _rounds(report: Report) -> Iterator[str]:
    rounds = report.get("rounds", [])
    if not rounds:
        return
    yield (
        f"{'point':<12}{'variant':<8}{'out tok/s':>10}{'all tok/s':>10}"
        f"{'TTFT ms 50/95/99':>24}{'ITL ms 50/95/99':>22}{'lost':>5}{'eager':>12}{'n':>3}"
        f"{'out over best':>28}"
    )
    ratios = report.get("summary", {}).get("ratios", {})
    for point in points_of(rounds):
        here = [row for row in rounds if point_of(row) == point]
        for name in sorted({row["variant"] for row in here}):
            rows = [row for row in here if row["variant"] == name]
            out, total, *late = (
                _median(rows, metric)
                for metric in ("tokens_per_s", "total_tokens_per_s", *LATENCIES)
            )
            first = "/".join(f"{value:.0f}" for value in late[:3])
            between = "/".join(f"{value:.1f}" for value in late[3:])
            lost = sum(row["lost"] for row in rows)
            eager = sum(row.get("prefill_eager", 0) for row in rows)
            batches = sum(row.get("prefill_batches", 0) for row in rows)
            found = ratios.get(f"{name}/best", {}).get("tokens_per_s", {}).get(point)
            yield (
                f"{point:<12}{name:<8}{out:>10.0f}{total:>10.0f}{first:>24}{between:>22}{lost:>5}"
                f"{f'{eager}/{batches}':>12}{len(rows):>3}{_text(found):>28}"
            )


def _ratios(report: Report) -> Iterator[str]:
    for name, found in report.get("summary", {}).get("ratios", {}).items():
        over = ", ".join(f"{metric} {_text(rows['together'])}" for metric, rows in found.items())
        yield f"{name} over all points: {over}"


def _starts(report: Report) -> Iterator[str]:
    for start in report.get("startup", []):
        phases = ", ".join(f"{name} {seconds}" for name, seconds in start["phases_s"].items())
        ready = "died" if start["ready_s"] is None else f"{start['ready_s']:.1f} s"
        yield (
            f"start {start['variant']} {'cold' if start['cold'] else 'warm'}: {ready}; kernels "
            f"{start['kernels_s']}, captures {start['captures_s']} ({phases})"
        )


def _median(rows: Sequence[Report], metric: str) -> float:
    values = [row[metric] for row in rows if row.get(metric) is not None]
    return median(values) if values else math.nan


def _text(found: Report | None) -> str:
    if found is None:
        return "-"
    name = f" {found['of']}" if "of" in found else ""
    if found["low"] is None:
        return f"{found['ratio']:.3f} (n={found['n']}){name}"
    return f"{found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]{name}"
