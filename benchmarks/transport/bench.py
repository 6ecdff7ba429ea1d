"""DeepEP low latency on any number of GPUs: `bench.py --out DIR`.

Dispatch and combine at 1 … T tokens per rank, eager and as CUDA graphs, and the parts of a whole
MoE layer at the same batch sizes. One process per rank; rank r uses GPU r modulo their number.
`--cpu` runs the same on CPU ranks with the torch transport, to test the benchmark.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
# Spawned ranks inherit the path. The checkout comes last, so that its `kernels/` hides no package.
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
sys.path.append(str(FOLDER.parents[1]))
from measure import Options, measure  # noqa: E402  (found through the path set above)
from package_versions import package_versions  # noqa: E402
from shapes import CPU_SHAPES, GPU_SHAPES, PUBLISHED, Shape  # noqa: E402

from tests.support import gpu_environment  # noqa: E402
from tests.support.ranks import run_ranks  # noqa: E402

RUN_LIMIT_S = 540.0


def environment(cpu: bool) -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "device": "CPU" if cpu else torch.cuda.get_device_name(),
        "gpus": 0 if cpu else torch.cuda.device_count(),
        "date": datetime.date.today().isoformat(),
        **package_versions(
            "torch", "triton", "sgl-deep-ep", "nvidia-nccl-cu13", "nvidia-nvshmem-cu13"
        ),
    }


def over_ranks(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By batch size: the median over ranks of every figure, and its largest."""
    rows = []
    for same in zip(*(result["rows"] for result in results), strict=True):
        row: dict[str, Any] = {"tokens": same[0]["tokens"]}
        for mode in ("eager", "graph", "kernels"):
            found = [rank.get(mode) for rank in same]
            if any(not isinstance(each, dict) for each in found):
                if found[0] is not None:
                    row[mode] = found  # why a rank has no trace
                continue
            row[mode] = {
                name: {
                    "us": median(each[name] for each in found),
                    "slowest_us": max(each[name] for each in found),
                }
                for name in found[0]
            }
        rows.append(row)
    return rows


def table(shape: Shape, rows: list[dict[str, Any]]) -> str:
    """Medians over ranks, us."""
    head = ("tokens", "how", "dispatch", "experts", "combine", "layer", "w13+act", "w2", "GB/s d/c")
    lines = [f"{shape.name}: " + "".join(f"{name:>10}" for name in head)]
    for row in rows:
        for mode in ("eager", "graph"):
            if mode not in row:
                continue
            us = {name: value["us"] for name, value in row[mode].items()}
            cells = [f"{us[name]:.1f}" for name in ("dispatch", "experts", "combine", "layer")]
            parts = row.get("kernels") if mode == "graph" else None
            if isinstance(parts, dict):
                cells += [f"{parts[name]['us']:.1f}" for name in ("w13 + activation", "w2")]
            else:
                cells += ["-", "-"]
            sent = [row["tokens"] * shape.top_k * size for size in shape.message_bytes()]
            speed = (sent[0] / us["dispatch"] / 1e3, sent[1] / us["combine"] / 1e3)
            cells.append(f"{speed[0]:.0f}/{speed[1]:.0f}")
            label = " " * (len(shape.name) + 2)
            lines.append(label + "".join(f"{c:>10}" for c in (row["tokens"], mode, *cells)))
    return "\n".join(lines)


def main() -> int:
    """Measure every shape in fresh processes and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=0, help="default: one per GPU")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--transport", choices=("deepep", "torch"), default="deepep")
    parser.add_argument("--shapes", nargs="+", help="names; default: all")
    parser.add_argument("--calls", type=int, default=20, help="in one graph or eager round")
    parser.add_argument("--rounds", type=int, default=11, help="samples of each figure")
    asked = parser.parse_args()
    ranks = asked.ranks or (2 if asked.cpu else torch.cuda.device_count())
    transport = "torch" if asked.cpu else asked.transport
    options = Options(asked.cpu, transport, asked.calls, asked.rounds)
    shapes = CPU_SHAPES if asked.cpu else GPU_SHAPES
    os.environ.update(gpu_environment.DEEPEP)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"transport-{transport}-{ranks}.json"
    report: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "environment": environment(asked.cpu),
        "ranks": ranks,
        "options": asdict(options),
        "published_ep8_us": PUBLISHED,
        "shapes": {},
    }
    failed = False
    for shape in shapes:
        if asked.shapes and shape.name not in asked.shapes:
            continue
        entry: dict[str, Any] = {"shape": asdict(shape)}
        report["shapes"][shape.name] = entry
        try:
            entry["rows"] = over_ranks(
                run_ranks(ranks, measure, shape, options, timeout_s=RUN_LIMIT_S)
            )
            print(table(shape, entry["rows"]), flush=True)
        except AssertionError as error:  # the other shapes are measured all the same
            entry["error"], failed = str(error), True
            print(f"{shape.name}: {error}", flush=True)
        path.write_text(json.dumps(report, indent=1))
    for source, (dispatch, combine) in PUBLISHED.items():
        print(f"published, EP8, 128 tokens of DeepSeek-V3: {dispatch} / {combine} us, {source}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
