"""Figure of results: `plot.py RESULT.json OUT.svg [LOAD]`, of what `bench.py merge` wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt

STYLES = {"a": ("C2", "^:"), "b": ("C1", "s--"), "c": ("C0", "o-")}
PANELS = (("tokens_per_s", "output tokens/s"), ("itl_ms", "inter-token latency, ms"))


def series(
    rounds: list[dict[str, Any]], variant: str, metric: str, load: str
) -> list[tuple[int, float, float, float]]:
    """Requests in flight, median, least and most of one variant's rounds of a load."""
    cells: dict[int, list[float]] = {}
    for row in rounds:
        closed = row.get("load", "short") == load and "concurrency" in row
        if closed and row["variant"] == variant and row.get(metric) is not None:
            cells.setdefault(row["concurrency"], []).append(row[metric])
    return [(point, median(v), min(v), max(v)) for point, v in sorted(cells.items())]


def draw(result: dict[str, Any], path: Path, load: str = "short") -> None:
    """Medians over concurrency, with the band between the lowest and the highest round."""
    titles = {start["variant"]: start["title"] for start in result.get("startup", [])}
    names = sorted({row["variant"] for row in result["rounds"]})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, (metric, label) in zip(axes, PANELS, strict=True):
        for name in names:
            points = series(result["rounds"], name, metric, load)
            if not points:
                continue
            x, middle, low, high = zip(*points, strict=True)
            colour, style = STYLES.get(name, ("C3", "d-."))
            axis.plot(x, middle, style, color=colour, label=titles.get(name, name))
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set(xlabel="concurrent requests", ylabel=label, ylim=(0, None))
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].legend(loc="upper left", fontsize=8)
    devices = f"{result.get('gpus', 1)} × {result['environment']['device']}"
    figure.suptitle(f"{result['model']}, {devices}", fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Draw one result file."""
    plt.rcParams["svg.hashsalt"] = "serving"  # the same file from the same numbers
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), *sys.argv[3:])


if __name__ == "__main__":
    main()
