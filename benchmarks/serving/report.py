"""From partial results to one: joined, compared with the bars, and printed as a short table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from ratios import consecutive, interval, paired, together

TOKENS_BAR = 0.98
ITL_BAR = 1.02
KERNELS_BAR = 1 / 3
GRANULE = 512 * 2**20  # of NVSHMEM's heap
METRICS = ("tokens_per_s", "itl_ms", "ttft_ms")
LISTS = ("commands", "startup", "rounds", "served", "compiled", "failed")

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


def summary(report: Report, base: str = "b") -> Report:
    """Ratios of every variant over ``base``, the band of ``base`` itself, and the bars."""
    rounds = report.get("rounds", [])
    points = sorted({r["concurrency"] for r in rounds})
    names = sorted({r["variant"] for r in rounds} - {base})
    ratios = {
        f"{name}/{base}": {
            metric: {
                **{str(p): interval(paired(rounds, name, base, p, metric)) for p in points},
                "together": together([paired(rounds, name, base, p, metric) for p in points]),
            }
            for metric in METRICS
        }
        for name in names
    }
    band = {
        metric: {
            str(p): [round(min(found), 4), round(max(found), 4)]
            for p in points
            if (found := consecutive(rounds, base, p, metric))
        }
        for metric in METRICS
    }
    bars = [*_speed_bars(ratios.get(f"c/{base}", {})), *_lost(report), *_start_bars(report)]
    bars += [*_request_path(report), *_memory_bars(report)]
    return {"ratios": ratios, f"band_{base}": band, "bars": bars}


def _bar(name: str, value: Any, ok: bool | None) -> Report:
    return {"bar": name, "value": value, "ok": ok}


def _speed_bars(ratios: Report) -> Iterable[Report]:
    for point, found in ratios.get("tokens_per_s", {}).items():
        if found and point != "together":
            # Fails only where the whole interval lies below.
            ok = found["high"] is None or found["high"] >= TOKENS_BAR
            yield _bar(f"tokens/s at {point}: not wholly below {TOKENS_BAR}", found, ok)
    for point, found in ratios.get("itl_ms", {}).items():
        if found and point != "together":
            ok = found["low"] is None or found["low"] <= ITL_BAR
            yield _bar(f"ITL at {point}: not wholly above {ITL_BAR}", found, ok)
    if found := ratios.get("tokens_per_s", {}).get("together"):
        yield _bar("tokens/s over all points: ahead", found, found["ratio"] > 1)


def _lost(report: Report) -> Iterable[Report]:
    both = [*report.get("rounds", []), *report.get("served", [])]
    lost = {name: sum(r["lost"] for r in both if r["variant"] == name) for name in ("b", "c")}
    if any(r["variant"] == "c" for r in both):
        yield _bar("requests lost: no more than b", lost, lost["c"] <= lost["b"])


def _start_bars(report: Report) -> Iterable[Report]:
    for cold in (True, False):
        starts = [s for s in report.get("startup", []) if s["cold"] == cold and s["ready_s"]]
        last = {s["variant"]: s for s in starts}
        if not {"b", "c"} <= set(last):
            continue
        b, c = last["b"], last["c"]
        name = "cold" if cold else "warm"
        ready = {"b": b["ready_s"], "c": c["ready_s"]}
        yield _bar(f"ready, {name}: no later than b", ready, c["ready_s"] <= b["ready_s"])
        for key in ("kernels_s", "kernels_and_captures_s"):
            values = {
                v["variant"]: round(
                    v["kernels_s"] + (v["captures_s"] if "captures" in key else 0), 2
                )
                for v in (b, c)
            }
            ok = values["c"] <= KERNELS_BAR * values["b"]
            yield _bar(f"{key}, {name}: at most a third of b's", values, ok)


def _request_path(report: Report) -> Iterable[Report]:
    """The host compiles kernels of its own at the first requests, whoever runs the experts."""
    names: dict[str, set[str]] = {}
    for entry in report.get("compiled", []):
        names.setdefault(entry["variant"], set()).update(entry["kernels"])
    if "c" in names:
        ours = sorted(names["c"] - names.get("b", set()))
        value = {"ours alone": ours, "the host's": sorted(names["c"] - set(ours))}
        yield _bar("compiled while serving: nothing that b does not compile", value, not ours)


def _memory_bars(report: Report) -> Iterable[Report]:
    for name, row in report.get("memory", {}).items():
        hint = row.get("deepep_hint_bytes")
        if hint is not None:
            value = {"planned": row["rdma_buffer_bytes"], "hint": hint}
            same = row["rdma_buffer_bytes"] == hint
            yield _bar(f"{name}: buffer equals DeepEP's hint", value, same)
        taken = row.get("buffer_device_bytes")
        if taken and row.get("alone"):
            value = {"planned": row["rdma_device_bytes"], "taken": taken}
            ok = max(taken) <= row["rdma_device_bytes"] <= min(taken) + GRANULE
            yield _bar(f"{name}: device bytes within one granule above", value, ok)


def table(report: Report) -> str:
    """Medians by concurrency and variant, then the bars."""
    head = f"{'conc':>5} {'variant':<9}{'tok/s':>9}{'TTFT ms':>9}{'ITL ms':>8}{'lost':>5}{'n':>3}"
    lines = [head + f"{'tok/s over b':>26}{'ITL over b':>26}"]
    ratios = report.get("summary", {}).get("ratios", {})
    cells: dict[tuple[int, str], list[Report]] = {}
    for row in report.get("rounds", []):
        cells.setdefault((row["concurrency"], row["variant"]), []).append(row)
    for (point, name), rows in sorted(cells.items()):
        tokens, itl, ttft = (_median(rows, metric) for metric in METRICS)
        against = [
            _text(ratios.get(f"{name}/b", {}).get(metric, {}).get(str(point)))
            for metric in METRICS[:2]
        ]
        lost = sum(r["lost"] for r in rows)
        lines.append(
            f"{point:>5} {name:<9}{tokens:>9.0f}{ttft:>9.1f}{itl:>8.2f}{lost:>5}{len(rows):>3}"
            f"{against[0]:>26}{against[1]:>26}"
        )
    for name, found in ratios.items():
        over = ", ".join(f"{m} {_text(found[m]['together'])}" for m in METRICS)
        lines.append(f"{name} over all points: {over}")
    for key, band in report.get("summary", {}).items():
        if key.startswith("band_"):
            lines.append(f"{key[5:]} against itself, tok/s: {band.get('tokens_per_s')}")
    for s in report.get("startup", []):
        phases = ", ".join(f"{name} {seconds}" for name, seconds in s["phases_s"].items())
        ready = "died" if s["ready_s"] is None else f"{s['ready_s']:.1f} s"
        lines.append(
            f"start {s['variant']} {'cold' if s['cold'] else 'warm'}: {ready}; kernels "
            f"{s['kernels_s']}, captures {s['captures_s']} ({phases})"
        )
    if distances := report.get("logprob_distance"):
        lines.append(f"mean |logprob difference|: {distances}")
    for bar in report.get("summary", {}).get("bars", []):
        lines.append(f"{'ok  ' if bar['ok'] else 'MISS'} {bar['bar']}: {bar['value']}")
    lines += [f"FAILED {line}"[:600] for line in report.get("failed", [])]
    return "\n".join(lines)


def _median(rows: Sequence[Report], metric: str) -> float:
    values = [row[metric] for row in rows if row.get(metric) is not None]
    return median(values) if values else math.nan


def _text(found: Report | None) -> str:
    if found is None:
        return "-"
    if found["low"] is None:
        return f"{found['ratio']:.3f} (n={found['n']})"
    return f"{found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
