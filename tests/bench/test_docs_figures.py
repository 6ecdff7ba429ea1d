"""Tables of throughput in the documents, recomputed from the results that they name."""

from __future__ import annotations

import json
import re
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


def test_readme_has_the_same_ratios() -> None:
    """Each row against the record that it links."""
    rows = rows_below("README.md", "## Results", "| GPUs |")
    assert len(rows) == 3
    for _, _, tokens, first, link in rows:
        (name,) = re.findall(r"results/(.+\.json)", link)
        ratios = report.summary(load(name))["ratios"][f"{OURS}/b"]
        found = [interval(ratios[m]["together"]) for m in ("tokens_per_s", "ttft_ms")]
        assert [tokens, first] == [text.replace(" [", " times [") for text in found], name


def test_readme_says_what_an_all_to_all_costs_one_gpu() -> None:
    """Stock without one, ours, stock DeepEP by hand."""
    record = load("2026-11-27-h200-serving.json")
    rows = rows_below("README.md", "## Use it when, and when not", "| concurrent requests |")
    assert [int(point) for point, *_ in rows] == [16, 64, 256]
    for point, *cells in rows:
        found = [middle(record, v, int(point), "tokens_per_s") for v in ("a", OURS, "b")]
        assert cells == [f"{value:,.0f}" for value in found], point
