"""What a result is held against: speed beside the stock host, losses, starts, memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from loads import LOADS

POINT_BAR = 0.98  # tokens/s over the best of the stock host, at every point
TOGETHER_BARS = {"best": 1.15, "tp": 1.0}  # over all points
EAGER_BAR = 0.01  # of prefill batches
KERNELS_BAR = 1 / 3
GRANULE = 512 * 2**20  # of NVSHMEM's heap
MINE = "c"

Report = dict[str, Any]


def bars(report: Report, ratios: Mapping[str, Report]) -> Iterator[Report]:
    """Every bar that the report can tell of."""
    yield from _speed(ratios)
    yield from _rounds(report)
    yield from _steady(report)
    yield from _starts(report)
    yield from _request_path(report)
    yield from _memory(report)


def _bar(name: str, value: Any, ok: bool | None) -> Report:
    return {"bar": name, "value": value, "ok": ok}


def _speed(ratios: Mapping[str, Report]) -> Iterable[Report]:
    best = ratios.get(f"{MINE}/best", {})
    for point, found in best.get("tokens_per_s", {}).items():
        if found and point != "together":
            # Fails only where the whole interval lies below.
            ok = found["high"] is None or found["high"] >= POINT_BAR
            yield _bar(f"tokens/s at {point}: not wholly below {POINT_BAR} of the best", found, ok)
    for metric in ("ttft_p95_ms", "itl_p95_ms"):
        for point, found in best.get(metric, {}).items():
            if found and point != "together":
                ok = found["low"] is None or found["low"] <= 1.0
                yield _bar(f"{metric} at {point}: not wholly above the best's", found, ok)
    for rival, least in TOGETHER_BARS.items():
        found = ratios.get(f"{MINE}/{rival}", {}).get("tokens_per_s", {}).get("together")
        if found:
            name = f"tokens/s over all points: at least {least} of {rival}"
            yield _bar(name, found, found["ratio"] >= least)


def _rounds(report: Report) -> Iterable[Report]:
    rows = [*report.get("rounds", []), *report.get("served", [])]
    mine = [row for row in rows if row["variant"] == MINE]
    if mine:
        lost = sum(row["lost"] for row in mine)
        yield _bar("requests lost: none", lost, lost == 0)
    if batches := sum(row.get("prefill_batches", 0) for row in mine):
        eager = sum(row["prefill_eager"] for row in mine if "prefill_eager" in row)
        value = {"eager": eager, "of": batches}
        yield _bar("prefill batches eager: less than 1 %", value, eager < EAGER_BAR * batches)


def _steady(report: Report) -> Iterable[Report]:
    """A point whose requests outlast the lead is counted while its first ones are still there, and
    its sides are at different shares of prompts."""
    taken: dict[tuple[str, float], dict[str, float]] = {}
    for row in report.get("rounds", []):
        load = LOADS.get(row.get("load", ""))
        if load is None or "itl_p50_ms" not in row or "concurrency" not in row:
            continue
        seconds = (row["ttft_p50_ms"] + sum(load.new) / 2 * row["itl_p50_ms"]) / 1000
        each = taken.setdefault((row["point"], row["lead_s"]), {})
        each[row["variant"]] = max(each.get(row["variant"], 0.0), round(seconds, 1))
    for (point, lead), each in taken.items():
        name = f"steady at {point}: a request is over within the lead of {lead} s"
        yield _bar(name, each, max(each.values()) <= lead)


def _starts(report: Report) -> Iterable[Report]:
    for cold in (True, False):
        starts = [s for s in report.get("startup", []) if s["cold"] == cold and s["ready_s"]]
        last = {s["variant"]: s for s in starts}
        if not {"b", MINE} <= set(last):
            continue
        stock, mine = last["b"], last[MINE]
        name = "cold" if cold else "warm"
        ready = {"b": stock["ready_s"], MINE: mine["ready_s"]}
        yield _bar(f"ready, {name}: no later than b", ready, mine["ready_s"] <= stock["ready_s"])
        for key in ("kernels_s", "kernels_and_captures_s"):
            values = {
                v["variant"]: round(
                    v["kernels_s"] + (v["captures_s"] if "captures" in key else 0), 2
                )
                for v in (stock, mine)
            }
            ok = values[MINE] <= KERNELS_BAR * values["b"]
            yield _bar(f"{key}, {name}: at most a third of b's", values, ok)


def _request_path(report: Report) -> Iterable[Report]:
    """The host compiles kernels of its own at the first requests, whoever runs the experts."""
    names: dict[str, set[str]] = {}
    for entry in report.get("compiled", []):
        names.setdefault(entry["variant"], set()).update(entry["kernels"])
    if MINE in names:
        mine = sorted(names[MINE] - names.get("b", set()))
        value = {"ours alone": mine, "the host's": sorted(names[MINE] - set(mine))}
        yield _bar("compiled while serving: nothing that b does not compile", value, not mine)


def _memory(report: Report) -> Iterable[Report]:
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
