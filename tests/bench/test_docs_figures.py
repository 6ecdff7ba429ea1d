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
    ("docs/gpu.md", "2026-11-24-h100-serving.json"),
    ("docs/several-gpus.md", "2026-11-27-h200x2-serving.json"),
]
OURS = "c"
FOUR_GPUS = "2026-11-27-h200x4-serving.json"
HEAD = "| concurrent requests | stock by hand, tokens/s |"


def load(name: str) -> report.Report:
    """One file of results."""
    found: report.Report = json.loads((RESULTS / name).read_text())
    return found


def rows_below(document: str, head: str) -> list[list[str]]:
    """Cells of the first table whose header begins so."""
    lines = iter((ROOT / document).read_text().splitlines())
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


@pytest.mark.parametrize(("document", "results"), TABLES)
def test_tables_of_throughput(document: str, results: str) -> None:
    """Medians, and paired ratios with their intervals."""
    result = load(results)
    ratios = report.summary(result)["ratios"][f"{OURS}/b"]
    *points, last = rows_below(document, HEAD)
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


def test_readme_has_the_same_throughput() -> None:
    """One GPU, and several."""
    text = (ROOT / "README.md").read_text()
    one = load(TABLES[0][1])
    for variant in ("b", OURS):
        points = [middle(one, variant, p, "tokens_per_s") for p in (1, 16, 64, 128, 256)]
        assert " / ".join(f"{value:,.0f}" for value in points) in text
    for results in (TABLES[0][1], TABLES[1][1], FOUR_GPUS):
        ratios = report.summary(load(results))["ratios"][f"{OURS}/b"]
        tokens, first = (interval(ratios[m]["together"]) for m in ("tokens_per_s", "ttft_ms"))
        said = rf"{re.escape(tokens.replace(' [', ' times ['))}; time to first token "
        assert re.search(said + re.escape(first.replace(" [", " times [")), text), results
