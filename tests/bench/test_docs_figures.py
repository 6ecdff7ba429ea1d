"""Tables of throughput in the documents, recomputed from the results that they name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median

import pytest

sys.path += [
    str(Path(__file__).parents[2] / "benchmarks" / "serving"),
    str(Path(__file__).parents[1] / "support"),
]
import report
from ratios import by_round

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
TABLES = [
    ("## Throughput on one GPU", "2026-11-24-h100-serving.json"),
    ("## Throughput on several GPUs", "2026-11-27-h200x2-serving.json"),
]
"""Headings of the records' page, and the record of the first table below each."""
OURS = "c"
DEFAULT = "c+mixed"
"""Measured before mixed chunks were the default."""
HEAD = "| concurrent requests | stock by hand, tokens/s |"


def load(name: str) -> report.Report:
    """One file of results."""
    found: report.Report = json.loads((RESULTS / name).read_text())
    return found


def rows_below(document: str, heading: str, head: str) -> list[list[str]]:
    """Cells of the first table behind the heading whose own head begins so."""
    _, _, behind = (ROOT / document).read_text().partition(f"{heading}\n")
    lines = iter(behind.splitlines())
    for line in lines:
        if line.startswith(head):
            break
    next(lines)
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return table


def middle(result: report.Report, variant: str, point: int, metric: str) -> float:
    """Median over the rounds."""
    return median(by_round(result["rounds"], variant, f"short/{point}", metric).values())


def check_loads(
    table: list[list[str]], record: report.Report, variants: str, over: report.Report, names: str
) -> None:
    """Rows of all points: medians of some variants, and one's paired ratios; the last of all."""
    *points, last = table
    rounds, metrics = record["rounds"], names.split()
    assert [row[0] for row in points] == list(dict.fromkeys(row["point"] for row in rounds))
    for point, *cells in points:
        medians = [
            median(by_round(rounds, v, point, "tokens_per_s").values()) for v in variants.split()
        ]
        ratios = [interval(over[metric][point]) for metric in metrics]
        assert cells == [*(f"{value:,.0f}" for value in medians), *ratios], point
    assert last[4:] == [interval(over[metric]["together"]) for metric in metrics]


def interval(found: report.Report) -> str:
    """As the documents write it."""
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


@pytest.mark.parametrize(("heading", "results"), TABLES)
def test_tables_of_throughput(heading: str, results: str) -> None:
    """Medians, and paired ratios with their intervals."""
    result = load(results)
    ratios = report.summary(result)["ratios"][f"{OURS}/b"]
    *points, last = rows_below("benchmarks/results/README.md", heading, HEAD)
    for name, stock, mine, tokens, itl, ttft in points:
        point = int(name)
        expected = [f"{middle(result, v, point, 'tokens_per_s'):,.0f}" for v in ("b", OURS)]
        assert [stock, mine] == expected, point
        found = [interval(ratios[metric][f"short/{name}"]) for metric in ("tokens_per_s", "itl_ms")]
        assert [tokens, itl] == found, point
        expected = [f"{middle(result, v, point, 'ttft_ms'):.1f}" for v in ("b", OURS)]
        assert ttft == ", ".join(expected), point
    assert {int(name) for name, *_ in points} == {r["concurrency"] for r in result["rounds"]}
    found = [interval(ratios[m]["together"]) for m in ("tokens_per_s", "itl_ms", "ttft_ms")]
    assert [last[0], *last[3:]] == ["together", *found[:2], f"ratio {found[2]}"]


HOSTS = [
    # twelve layers: record, head of its table on the records' page, variants, ours, ratios
    ("h100x4", "| load / requests, four H100s |", "g t", DEFAULT, "tokens_per_s itl_p95_ms"),
    ("h200x2", "| load / requests |", "a g", OURS, "tokens_per_s ttft_p95_ms itl_p95_ms"),
]


@pytest.mark.parametrize(("host", "head", "stock", "ours", "metrics"), HOSTS)
def test_loads_of_twelve_layers(host: str, head: str, stock: str, ours: str, metrics: str) -> None:
    """Medians and ratios of the table, and what README says of them together."""
    record = load(f"2026-11-28-{host}-serving-fp8.json")
    found = report.summary(record)["ratios"]
    (parallel,) = set(stock.split()) - {"g"}
    over, over_tp = found[f"{ours}/g"], found[f"{ours}/{parallel}"]
    heading = "## Own graphs, loads that users run"
    table = rows_below("benchmarks/results/README.md", heading, head)
    check_loads(table, record, f"{stock} {ours}", over, metrics)
    said = [interval(each["tokens_per_s"]["together"]) for each in (over, over_tp)]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"{said[0]} of attention DP + EP and {said[1]} of tensor" in text or (
        f"{said[0]} and {said[1]}, where the CPU binds" in text
    )


def test_readme_has_the_same_figures() -> None:
    """Medians of every point, ratios with their intervals, and the sentences below the table."""
    record = load("2026-11-28-h200x2-serving-fp8-48.json")
    found = report.summary(record)["ratios"]
    over, over_tp = found[f"{OURS}/g"], found[f"{OURS}/a"]
    table = rows_below("README.md", "## Results", "| load / requests |")
    check_loads(table, record, f"g a {OURS}", over, "tokens_per_s itl_p95_ms ttft_p95_ms")
    text = " ".join((ROOT / "README.md").read_text().split())
    first = f"{over_tp['ttft_p95_ms']['together']['ratio']:.2f}"
    said = f"together {interval(over_tp['tokens_per_s']['together'])}, with {first} times its time"
    assert f"Against tensor parallelism {said}" in text
    by_hand = report.summary(load("2026-11-24-h100-serving.json"))["ratios"][f"{OURS}/b"]
    assert f"one H100, bf16: {interval(by_hand['tokens_per_s']['together'])}" in text


def test_readme_says_what_an_all_to_all_costs_one_gpu() -> None:
    """Stock without one, ours, stock DeepEP by hand."""
    record = load("2026-11-27-h200-serving.json")
    rows = rows_below("README.md", "## Use it when, and when not", "| concurrent requests |")
    assert [int(point) for point, *_ in rows] == [16, 64, 256]
    for point, *cells in rows:
        found = [middle(record, v, int(point), "tokens_per_s") for v in ("a", OURS, "b")]
        assert cells == [f"{value:,.0f}" for value in found], point
