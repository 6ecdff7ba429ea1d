"""The serving benchmark's ratios, joined reports and bars."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path += [
    str(Path(__file__).parents[2] / "benchmarks" / "serving"),
    str(Path(__file__).parents[2] / "benchmarks"),
    str(Path(__file__).parents[1] / "support"),
]
import ratios
import report
import tables


def test_interval_of_known_ratios() -> None:
    """Logarithms 0.01, 0.02, 0.03: mean 0.02, standard error 0.01 / sqrt 3, t = 4.303."""
    found = ratios.interval([math.exp(x) for x in (0.01, 0.02, 0.03)])
    assert found is not None
    half = 4.303 * 0.01 / math.sqrt(3)
    assert found["ratio"] == pytest.approx(math.exp(0.02), abs=1e-4)
    assert found["low"] == pytest.approx(math.exp(0.02 - half), abs=1e-4)
    assert found["high"] == pytest.approx(math.exp(0.02 + half), abs=1e-4)
    assert ratios.interval([]) is None
    assert ratios.interval([1.1]) == {"ratio": 1.1, "low": None, "high": None, "n": 1}


def test_points_weigh_the_same_together() -> None:
    found = ratios.together([[1.0, 1.0, 1.0, 1.0], [1.21, 1.21]])
    assert found == {"ratio": 1.1, "low": 1.1, "high": 1.1, "n": 6}
    spread = ratios.together([[0.9, 1.1, 1.0], [1.2, 1.3, 1.25]])
    assert spread is not None
    assert spread["low"] < spread["ratio"] < spread["high"]


def _round(variant: str, index: int, point: int, tokens: float, lost: int = 0) -> dict[str, Any]:
    return {
        "variant": variant, "key": f"x/{point}/{index}", "concurrency": point, "lost": lost,
        "tokens_per_s": tokens, "itl_p95_ms": 1e3 * point / tokens, "ttft_ms": 10.0, "done": 1,
    }  # fmt: skip


def _part(rounds: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"environment": {"device": "x", "date": "d"}, "model": "m", "rounds": rounds, **more}


def _bars(merged: dict[str, Any]) -> dict[str, bool]:
    return {bar["bar"]: bar["ok"] for bar in merged["summary"]["bars"]}


def test_merge_pairs_rounds_and_checks_the_bars() -> None:
    one = [_round("b", i, 1, 100 + i) for i in range(3)]
    one += [_round("c", i, 1, 1.1 * (100 + i)) for i in range(3)]
    two = [_round("b", i, 64, 1000 + i) for i in range(3)]
    two += [_round("c", i, 64, 0.9 * (1000 + i), lost=1) for i in range(3)]
    start = {"phases_s": {}, "cold": True}
    starts = [
        {**start, "variant": "b", "ready_s": 100.0, "kernels_s": 9.0, "captures_s": 30.0},
        {**start, "variant": "c", "ready_s": 60.0, "kernels_s": 3.0, "captures_s": 20.0},
    ]
    memory = {"c": {"rdma_buffer_bytes": 5, "deepep_hint_bytes": 5, "alone": True,
                    "rdma_device_bytes": 2**30, "buffer_device_bytes": [2**30 - 1]}}  # fmt: skip
    compiled = [{"variant": "c", "cold": True, "kernels": ["mine", "shared"]}]
    compiled += [{"variant": "b", "cold": True, "kernels": ["shared"]}]
    merged = report.merge(
        [
            _part(one, commands=["rounds --points 1"]),
            _part(two, commands=["rounds --points 64"], memory=memory),
            _part([], startup=starts, compiled=compiled),
        ]
    )
    assert merged["commands"] == ["rounds --points 1", "rounds --points 64"]
    ratios = merged["summary"]["ratios"]
    assert ratios["c/b"]["tokens_per_s"]["short/64"]["ratio"] == 0.9
    assert ratios["c/best"]["tokens_per_s"]["short/64"]["of"] == "b"
    assert "c/tp" not in ratios
    bars = _bars(merged)
    assert bars["tokens/s at short/1: not wholly below 0.98 of the best"]
    assert not bars["tokens/s at short/64: not wholly below 0.98 of the best"]
    assert bars["itl_p95_ms at short/1: not wholly above the best's"]
    assert not bars["itl_p95_ms at short/64: not wholly above the best's"]
    assert not bars["tokens/s over all points: at least 1.15 of best"]  # 1.1 x 0.9
    assert not bars["requests lost: none"]
    assert bars["ready, cold: no later than b"]
    assert bars["kernels_s, cold: at most a third of b's"]
    assert not bars["kernels_and_captures_s, cold: at most a third of b's"]
    assert not bars["compiled while serving: nothing that b does not compile"]
    assert bars["c: buffer equals DeepEP's hint"]
    assert bars["c: device bytes within one granule above"]
    assert "MISS" in tables.table(merged)


def test_a_point_is_steady_once_its_first_requests_are_over() -> None:
    """128 tokens of an answer at 10 and 20 ms each, behind a lead of two seconds."""
    rounds = [
        {**_round(variant, 0, 64, 1.0), "point": "short/64", "load": "short", "lead_s": 2.0,
         "ttft_p50_ms": 100.0, "itl_p50_ms": itl}
        for variant, itl in (("b", 10.0), ("c", 20.0))
    ]  # fmt: skip
    name = "steady at short/64: a request is over within the lead of 2.0 s"
    assert not _bars(report.merge([_part(rounds)]))[name]
    assert _bars(report.merge([_part(rounds[:1])]))[name]


def test_the_best_rival_is_another_at_each_point() -> None:
    """And another for each metric; tensor parallelism is a rival of its own."""
    rounds = []
    for index in range(3):
        for name, one, many in (("g", 100, 900), ("b", 90, 1000), ("a", 200, 500), ("c", 110, 950)):
            rounds.append(_round(name, index, 1, one + index) | {"ttft_p95_ms": 5.0 + one})
            rounds.append(_round(name, index, 64, many + index) | {"prefill_batches": 50})
            rounds[-1] |= {"prefill_eager": int(name == "c"), "point": "chat/64"}
    found = report.summary({"rounds": rounds})
    best, tp = (found["ratios"][f"c/{rival}"]["tokens_per_s"] for rival in ("best", "tp"))
    assert best["short/1"]["of"] == "g"
    assert best["chat/64"]["of"] == "b"
    assert found["ratios"]["c/best"]["ttft_p95_ms"]["short/1"]["of"] == "b"  # the earliest
    assert tp["short/1"]["of"] == tp["chat/64"]["of"] == "a"
    bars = _bars({"summary": found})
    assert bars["tokens/s over all points: at least 1.0 of tp"]
    assert not bars["prefill batches eager: less than 1 %"]  # 3 of 150
    assert bars["requests lost: none"]


def test_merge_keeps_the_checks_of_every_command() -> None:
    parts: list[report.Report] = [
        {"checks": {"c": {"idle ranks": "ok"}}},
        {"checks": {"c": {"seconds": 6.5}, "d512": {"idle ranks": "ok"}}},
    ]
    merged = report.merge(parts)
    assert merged["checks"] == {
        "c": {"idle ranks": "ok", "seconds": 6.5},
        "d512": {"idle ranks": "ok"},
    }


def test_merge_refuses_results_of_two_machines() -> None:
    other = _part([]) | {"environment": {"device": "y", "date": "d"}}
    with pytest.raises(ValueError, match="not of one machine"):
        report.merge([_part([]), other])
