"""Figures of the kernel results: `plot.py RESULT.json OUT_DIR`, one per model."""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from verdict import FEW

SERIES = (
    ("us", "this plugin", "C0", "o-"),
    ("deepgemm_us", "DeepGEMM + activation kernel", "C1", "s--"),
    ("read_us", "a plain read of the weights", "C7", ":"),
)


def roofline(cell: dict[str, Any], ceilings: dict[str, float]) -> float:
    """Least microseconds that the run's ceilings allow a cell."""
    stream = max(ceilings["copy_TBps"], ceilings["read_TBps"])
    peak = ceilings[f"dense_{cell['dtype']}_TFLOPs"]
    return max(cell["bytes"] / stream, cell["flops"] / peak) / 1e6


def draw(model: str, result: dict[str, Any], path: Path) -> None:
    """Percent of the roofline over rows per expert, bf16 and fp8 side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, name in zip(axes, ("bf16", "fp8_block"), strict=True):
        cells = [
            c
            for c in result["cells"]
            if c["model"] == model and c["format"] == name and c["routing"] == "uniform"
        ]
        for key, label, colour, style in SERIES:
            points = [
                (c["rows"], 100 * roofline(c, result["ceilings"]) / c[key])
                for c in cells
                if key in c and (key != "read_us" or c["rows"] <= FEW)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label)
        axis.axhline(100, color="grey", linewidth=0.8)
        axis.set(title=f"{model}, {name}", xlabel="rows per expert", ylim=(0, 105))
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("% of the roofline")
    axes[0].legend(loc="lower left", fontsize=8)
    figure.suptitle(f"Whole expert layer, {result['environment']['device']}", fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Draw every model of one result file."""
    result, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    plt.rcParams["svg.hashsalt"] = "kernels"  # the same file from the same numbers
    for model in dict.fromkeys(c["model"] for c in result["cells"]):
        name = model.split(" EP")[0].lower().replace(" ", "-")
        draw(model, result, out / f"kernels-{name}.svg")


if __name__ == "__main__":
    main()
