"""What skewed routing costs a layer over uniform routing of as many rows: `skew.py --out DIR`.

Both have the same operations and, where every expert is live, the same bytes: what uniform routing
itself misses of the ceilings is the business of stage `bars`. Zipf's counts are dealt to the
experts in several orders, since sorted ones flatter a static list of tiles.

The kernels of another tree (`--beside TREE/kernels`) are timed on the same tensors, between ours;
their results must have the same bits wherever both choose the same tiles.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import Watchdog, environment
from cases import MODELS, model_shape
from deepgemm import layer_call

from moe_plugin.kernels.formats import BF16, FORMATS, FP8_BLOCK, Format
from moe_plugin.kernels.tuning.routings import shuffled, uniform_counts, zipf_counts
from moe_plugin.kernels.tuning.tune import Buffers, graph_seconds

ROWS = (256, 128, 512, 64)  # the most telling first: time may end
FEW_EXPERTS = 3  # the models before it have experts enough to be skewed
BAR = 1.15  # times the same layer's time under uniform routing
OURS, BESIDE, DEEPGEMM = "ours", "beside", "DeepGEMM"
Routings = dict[str, list[torch.Tensor]]


@dataclass(frozen=True)
class Kernels:
    """One tree's kernels, and a layer's weights as they want them."""

    package: str
    shape: Any
    device: Any
    layers: tuple[Any, ...]

    @staticmethod
    def create(package: str, buffers: Buffers) -> "Kernels":
        formats, weights = _module(package, "formats"), _module(package, "weights")
        s = buffers.shape
        fmt = formats.FORMATS[s.format.name]
        layers = tuple(
            (x, scale, weights.ExpertWeights(w.w13, w.w2, w.w13_scale, w.w2_scale, fmt))
            for x, scale, w in buffers.layers
        )
        shape = _module(package, "launch").Shape(s.experts, s.capacity, s.hidden, s.inter, fmt)
        device = _module(package, "problem").device_of(buffers.out)
        return Kernels(package, shape, device, layers)

    def launch(self, rows: int) -> Any:
        """The one that the server would take."""
        return _module(self.package, "launch").pick_launch(self.shape, rows, self.device)

    def compile(self, launches: Sequence[Any]) -> None:
        _module(self.package, "experts").compile_at_once(self.shape, launches, self.device)

    def call(
        self, copy: int, masked_m: torch.Tensor, rows: int, launch: Any, out: torch.Tensor
    ) -> torch.Tensor:
        layer = self.layers[copy % len(self.layers)]
        experts = _module(self.package, "experts")
        result: torch.Tensor = experts.batched_experts(
            *layer, masked_m, rows, out=out, launch=launch
        )
        return result


def _module(package: str, name: str) -> Any:
    return importlib.import_module(f"{package}.{name}")


def import_beside(kernels: Path) -> str:
    """Makes another tree's kernels a package of this process, and returns its name."""
    name = "kernels_beside"
    folder = Path(tempfile.mkdtemp())
    (folder / name).symlink_to(kernels.resolve(), target_is_directory=True)
    sys.path.append(str(folder))
    return name


def routings(shape: Any, rows: int) -> Routings:
    """Counts that take turns, by the name of the routing."""
    given = shape.experts, rows, shape.capacity
    zipf = zipf_counts(*given)
    each = {"uniform": [uniform_counts(*given)], "zipf": [zipf], "shuffled": shuffled(zipf)}
    return {
        name: [torch.tensor(counts, dtype=torch.int32, device="cuda") for counts in turns]
        for name, turns in each.items()
    }


def time_skew(
    buffers: Buffers,
    rows: Sequence[int],
    beside: str | None,
    deepgemm: bool,
    left: Callable[[], bool],
) -> list[dict[str, Any]]:
    """Microseconds by contender and routing, of one model's layer over rows per expert."""
    ours = Kernels.create("moe_plugin.kernels", buffers)
    other = Kernels.create(beside, buffers) if beside else None
    chosen = {m: ours.launch(m) for m in rows}
    ours.compile([*chosen.values()])
    if other:
        other.compile([other.launch(m) for m in rows])
    cells = []
    for m in rows:
        if not left():
            break
        contenders: dict[str, Callable[[int, torch.Tensor], Any]] = {
            OURS: lambda copy, mask, m=m: ours.call(copy, mask, m, chosen[m], buffers.out)
        }
        if other:
            contenders[BESIDE] = lambda copy, mask, m=m: other.call(
                copy, mask, m, None, buffers.out
            )
        if deepgemm:
            contenders[DEEPGEMM] = lambda copy, mask, m=m: layer_call(
                buffers.layers[copy % len(buffers.layers)], mask, m
            )
        routed = routings(buffers.shape, m)
        us: dict[str, dict[str, float]] = {name: {} for name in contenders}
        for routing, masks in routed.items():  # contenders in turns: clocks drift
            for name, contender in contenders.items():
                calls = [
                    lambda i=i, contender=contender, masks=masks: contender(
                        i, masks[i % len(masks)]
                    )
                    for i in range(8)
                ]
                us[name][routing] = 1e6 * graph_seconds(calls)
        cell = {"rows": m, "launch": str(chosen[m]), "us": us, "over_uniform": _over(us)}
        if other and str(other.launch(m)) == str(chosen[m]):
            cell["same_bits"] = _same_bits(contenders, buffers.out, routed["shuffled"])
        cells.append(cell)
    return cells


def _over(us: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {r: each[r] / each["uniform"] for r in each if r != "uniform"}
        for name, each in us.items()
    }


def _same_bits(
    contenders: dict[str, Callable[[int, torch.Tensor], Any]], out: torch.Tensor,
    masks: Sequence[torch.Tensor],
) -> bool:  # fmt: skip
    """Whether the other tree's rows have the bits of ours, under every order of the counts."""
    rows = torch.arange(out.shape[1], device=out.device)
    for mask in masks:
        contenders[BESIDE](0, mask)
        want = out.clone()
        contenders[OURS](0, mask)
        differs = (out.view(torch.int16) != want.view(torch.int16)).any(-1)
        if (differs & (rows < mask.unsqueeze(-1))).any():
            return False
    return True


def describe(cell: dict[str, Any]) -> str:
    """One line a contender."""
    lines = []
    for name, us in cell["us"].items():
        over = " ".join(
            f"{routing} {us[routing]:7.1f} ({ratio:.2f}{' MISS' * (ratio > BAR)})"
            for routing, ratio in cell["over_uniform"][name].items()
        )
        lines.append(f"m={cell['rows']:4} {name:9} uniform {us['uniform']:7.1f}  {over}")
    if "same_bits" in cell:
        lines.append(f"m={cell['rows']:4} bits as beside: {cell['same_bits']}")
    return "\n".join(lines)


class Deadline:
    """Whether there is time left; without end where no seconds were given."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds if seconds else float("inf")

    def __call__(self) -> bool:
        return time.monotonic() < self.end


def run(args: argparse.Namespace, formats: Sequence[Format]) -> None:
    """Models and formats that no time is left for are named and not begun."""
    left, watchdog = Deadline(args.seconds), Watchdog(120)
    beside = import_beside(args.beside) if args.beside else None
    result: dict[str, Any] = {"environment": environment(), "cells": []}
    for fmt in formats:
        for index in args.models:
            label = f"{MODELS[index].name} {fmt.name}"
            if not left():
                print(f"no time left for {label}", flush=True)
                continue
            watchdog(label)
            buffers = Buffers.create(model_shape(index, fmt, max(args.rows)))
            cells = time_skew(buffers, args.rows, beside, not args.no_deepgemm, left)
            del buffers  # before the next model's are made
            for cell in cells:
                print(label, describe(cell), sep="\n", flush=True)
                cell |= {"model": MODELS[index].name, "format": fmt.name}
            result["cells"] += cells
            (args.out / "kernels-skew.json").write_text(json.dumps(result, indent=1))


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", type=int, nargs="+", default=list(range(FEW_EXPERTS)))
    parser.add_argument(
        "--formats", nargs="+", choices=FORMATS, default=[FP8_BLOCK.name, BF16.name]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="per expert")
    parser.add_argument("--beside", type=Path, help="another tree's kernels/")
    parser.add_argument("--no-deepgemm", action="store_true")
    parser.add_argument("--seconds", type=float, default=0, help="after which no cell is begun")
    args = parser.parse_args()
    torch.manual_seed(0)
    run(args, [FORMATS[name] for name in args.formats])


if __name__ == "__main__":
    main()
