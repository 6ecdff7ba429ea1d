"""Check, then measure, the expert kernels: `bench.py STAGE --out DIR`.

Stages: check (correctness), sweep (tile candidates; writes a table), bars (the entry point that
the server calls, against DeepGEMM, the host's fused MoE and the ceilings), eager (what a layer
costs the host where no graph is replayed), wide (launches with other rows than they were chosen
for), packed (4-bit weights beside our FP8 and bf16 and the host's Marlin MoE and humming; models of
`cases.PACKED_MODELS`), compile (seconds to compile and load all kernels of a plan, from an empty
cache and from a filled one). `check` comes first: `all.sh` and `make bench-kernels` time nothing
after a red one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cases import (
    MODELS,
    MORE_TOKENS,
    TOKENS,
    layer_bytes,
    layer_flops,
    model_shape,
    reachable_rows,
)
from ceilings import measure_ceilings, weights_read_seconds
from deepgemm import layer_call
from eager import time_eager
from environment import environment
from fused_moe import fused_call, routed_tokens
from kernel_cases import ROUTINGS, check, every_candidate, make_layer
from packed import ROWS as PACKED_ROWS
from packed import run_packed
from verdict import ceilings_sound, verdict
from wide import LIVE_ROWS, time_wide

from moe_plugin.kernels.experts import batched_experts
from moe_plugin.kernels.formats import FORMATS, Format
from moe_plugin.kernels.launch import Shape, entry_of_launch, pick_launch, table_key
from moe_plugin.kernels.problem import device_of
from moe_plugin.kernels.tuning.precompile import precompile
from moe_plugin.kernels.tuning.tune import (
    ROW_COUNTS,
    Buffers,
    candidate_launches,
    graph_seconds,
    save_table,
    tune_cell,
)

STAGES = ("check", "sweep", "bars", "eager", "wide", "packed", "compile")
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
EAGER_ROWS = (1, 64)


class Watchdog:
    """Ends the process when a stage hangs, so that what was measured is kept."""

    def __init__(self, seconds: float) -> None:
        self.timer: threading.Timer | None = None
        self.seconds = seconds

    def __call__(self, label: str) -> None:
        if self.timer:
            self.timer.cancel()
        self.timer = threading.Timer(self.seconds, self._expire, (label,))
        self.timer.daemon = True
        self.timer.start()

    @staticmethod
    def _expire(label: str) -> None:
        print(f"HANG in {label}", flush=True)
        os._exit(3)


def run_checks(formats: Sequence[Format], watchdog: Watchdog) -> bool:
    """Every candidate, in every format, on small ragged layers."""
    good = True
    device = device_of(torch.empty(0, device="cuda"))
    small = (
        (128, 256, 384, (0, 1, 128, 33)),  # fewer tiles than programs
        (64, 1152, 176, (5, 0, 64, 17, 1)),  # ragged channels, scale blocks that straddle tiles
        (512, 2048, 1024, (64, 0, 300, 512, 7, 1, 129, 40)),  # many tiles per program
        (256, 1024, 2048, (77,)),  # one expert
    )
    for capacity, hidden, inter, counts in small:
        for fmt in formats:
            layer = make_layer(capacity, hidden, inter, counts, fmt, "cuda")
            ours = Shape(len(counts), capacity, hidden, inter, fmt)
            launches = every_candidate(ours)
            precompile([(ours, launch) for launch in launches], device, os.cpu_count() or 4)
            for launch in launches:
                label = f"{hidden}x{inter} {fmt.name} {launch.gate_up} | {launch.down}"
                watchdog(label)
                try:
                    out = layer.poisoned_output()
                    batched_experts(*layer.args(), 8, out=out, launch=launch)
                    again = layer.poisoned_output()
                    batched_experts(*layer.args(), 8, out=again, launch=launch)
                    check(label, out, layer)
                    same = torch.equal(out.view(torch.int16), again.view(torch.int16))
                    assert same, f"{label}: bits differ from run to run"
                except Exception as error:
                    good = False
                    print(f"RED {type(error).__name__}: {error}"[:300], flush=True)
            torch.cuda.synchronize()
            print(f"checked {hidden}x{inter} {fmt.name}", flush=True)
    print("checks green" if good else "checks RED", flush=True)
    return good


def run_sweep(
    out: Path, models: list[int], formats: Sequence[Format], rows: Sequence[int], watchdog: Watchdog
) -> None:
    """Per-GEMM and per-layer timings of every candidate."""
    result: dict[str, Any] = {"environment": environment(), "cells": []}
    launches: dict[str, Any] = {}
    begin = time.time()
    shapes = [(model_shape(i, fmt, m), m) for i in models for fmt in formats for m in rows]
    device = device_of(torch.empty(0, device="cuda"))
    jobs = [(shape, launch) for shape, m in shapes for launch in candidate_launches(shape, m)]
    failed = precompile(jobs, device, os.cpu_count() or 4)
    print(f"{len(jobs)} candidates compiled in {time.time() - begin:.0f} s", flush=True)
    print("\n".join(sorted(set(failed.values())))[:1000], flush=True)
    for index in models:
        for fmt in formats:
            shape, buffers = None, None
            for m in rows:
                if shape != model_shape(index, fmt, m):
                    buffers = None
                    shape = model_shape(index, fmt, m)
                    buffers = Buffers.create(shape)
                watchdog(f"sweep {MODELS[index].name} {fmt.name} {m}")
                record: list[dict] = []
                begin = time.time()
                best = tune_cell(buffers, m, record, {job[1] for job in failed})
                counts = (m,) * shape.experts
                floor = layer_bytes(shape, counts)
                us = min(r["us"] for r in record if r["which"] == "layer")
                result["cells"].append({
                    "model": MODELS[index].name, "dtype": fmt.tuning, "format": fmt.name,
                    "rows": m, "best": entry_of_launch(best),
                    "us": us, "bytes": floor, "flops": layer_flops(shape, counts),
                    "timings": record,
                })  # fmt: skip
                print(f"{MODELS[index].name:16} {fmt.name} m={m:4} {us:8.1f} us "
                      f"{floor / us / 1e6:5.2f} TB/s {layer_flops(shape, counts) / us / 1e6:6.0f} "
                      f"TFLOP/s  {best.gate_up} {best.down} ({time.time() - begin:.1f}s)",
                      flush=True)  # fmt: skip
                (out / "kernels-sweep.json").write_text(json.dumps(result))
                launches[table_key(shape, m)] = entry_of_launch(best)
                save_table(out / "table.json", device.name, launches)


def run_bars(
    out: Path, models: list[int], formats: Sequence[Format], rows: Sequence[int],
    routings: list[str], fused_rows: list[int], watchdog: Watchdog,
) -> None:  # fmt: skip
    """The server's entry point against DeepGEMM and this run's ceilings."""
    watchdog("ceilings")
    limits = measure_ceilings()
    stream = max(limits["copy_TBps"], limits["read_TBps"])
    result: dict[str, Any] = {"environment": environment(), "ceilings": limits, "cells": []}
    print(limits, flush=True)
    for index in models:
        for fmt in formats:
            shape, buffers = None, None
            for m in rows:
                if shape != model_shape(index, fmt, m):
                    buffers = None
                    shape = model_shape(index, fmt, m)
                    buffers = Buffers.create(shape)
                    read_us = 1e6 * weights_read_seconds(buffers.layers)
                for routing in routings:
                    counts = ROUTINGS[routing](shape.experts, m, shape.capacity)
                    watchdog(f"bars {MODELS[index].name} {fmt.name} {m} {routing}")
                    cell = time_cell(buffers, counts, m)
                    if routing == "uniform" and m in fused_rows:
                        cell |= time_fused_moe(buffers, m, MODELS[index].top_k)
                    floor, flops = layer_bytes(shape, counts), layer_flops(shape, counts)
                    cell |= {
                        "model": MODELS[index].name, "dtype": fmt.tuning, "format": fmt.name,
                        "rows": m, "routing": routing,
                        "reachable": m <= reachable_rows(index, MORE_TOKENS),
                        "bytes": floor, "flops": flops,
                        "read_us": read_us, "stream_fraction": floor / cell["us"] / 1e6 / stream,
                        "peak_fraction": flops / cell["us"] / 1e6
                        / limits[f"dense_{'fp8' if fmt.fp8_rows else 'bf16'}_TFLOPs"],
                    }  # fmt: skip
                    cell["over_floor"] = 1 / max(cell["stream_fraction"], cell["peak_fraction"])
                    result["cells"].append(cell)
                    base = cell.get("deepgemm_us")
                    ratio = base / cell["us"] if base else 0
                    fused = cell.get("fused_moe_us", 0)
                    print(
                        f"{cell['model']:16} {cell['format']:10} {routing:8} m={m:4} "
                        f"{cell['us']:8.1f} us  {100 * cell['stream_fraction']:5.1f}% stream "
                        f"{100 * cell['peak_fraction']:5.1f}% peak  x{ratio:.2f} DeepGEMM  "
                        f"x{fused / cell['us']:.2f} fused MoE  {cell['over_floor']:.2f} x floor",
                        flush=True,
                    )
                    (out / "kernels-bars.json").write_text(json.dumps(result, indent=1))
    if not ceilings_sound(result["environment"]["device"], limits):
        print("VOID: the ceilings of this run are too low")
    print(*verdict(result["cells"]), sep="\n", flush=True)


def time_cell(buffers: Buffers, counts: tuple[int, ...], expected_m: int) -> dict[str, Any]:
    """Microseconds of our layer and of DeepGEMM's on the same tensors and counts."""
    masked_m = torch.tensor(counts, dtype=torch.int32, device="cuda")
    layers = buffers.layers

    def ours(copy: int) -> Any:
        layer = layers[copy % len(layers)]
        return lambda: batched_experts(*layer, masked_m, expected_m, out=buffers.out)

    def theirs(copy: int) -> Any:
        return lambda: layer_call(layers[copy % len(layers)], masked_m, expected_m)

    launch = pick_launch(buffers.shape, expected_m, device_of(buffers.out))
    cell: dict[str, Any] = {"launch": entry_of_launch(launch)}
    cell["us"] = 1e6 * graph_seconds([ours(c) for c in range(8)])
    try:
        cell["deepgemm_us"] = 1e6 * graph_seconds([theirs(c) for c in range(8)])
    except Exception as error:  # the baseline refuses some shapes
        cell["deepgemm_error"] = f"{type(error).__name__}: {error}"[:200]
    return cell


def time_fused_moe(buffers: Buffers, rows: int, top_k: int) -> dict[str, Any]:
    """Microseconds of the host's fused MoE on tokens that give each expert as many rows."""
    routed = routed_tokens(buffers.shape.experts, rows, top_k, buffers.shape.hidden)
    if routed is None:
        return {}
    layers = buffers.layers
    calls = [lambda c=c: fused_call(layers[c % len(layers)], routed) for c in range(4)]
    try:
        return {"fused_moe_us": 1e6 * graph_seconds(calls)}
    except Exception as error:  # another program's limits do not end this one
        return {"fused_moe_error": f"{type(error).__name__}: {error}"[:200]}


def run_eager(
    out: Path, models: list[int], formats: Sequence[Format], rows: Sequence[int], watchdog: Watchdog
) -> None:
    """One eager call of the server's entry point, on the host's clock."""
    result: dict[str, Any] = {"environment": environment(), "cells": []}
    for index in models:
        for fmt in formats:
            shape = model_shape(index, fmt, max(rows))
            buffers = None  # frees the previous shape's memory first
            buffers = Buffers.create(shape)
            for m in rows:
                watchdog(f"eager {MODELS[index].name} {fmt.name} {m}")
                cell = {
                    "model": MODELS[index].name,
                    "dtype": fmt.tuning,
                    "format": fmt.name,
                    "rows": m,
                }
                cell |= time_eager(buffers, m)
                result["cells"].append(cell)
                print(cell, flush=True)
                (out / "kernels-eager.json").write_text(json.dumps(result, indent=1))


def run_wide(
    out: Path, models: list[int], formats: Sequence[Format], rows: Sequence[int],
    routings: list[str], watchdog: Watchdog,
) -> None:  # fmt: skip
    """Launches chosen for decode, with and without rows of other DP groups' prefill."""
    result: dict[str, Any] = {"environment": environment(), "cells": []}
    for index in models:
        for fmt in formats:
            watchdog(f"wide {MODELS[index].name} {fmt.name}")
            cells = time_wide(index, fmt, rows, routings)
            result["cells"] += cells
            for cell in cells:
                over = {chosen: round(ratio, 2) for chosen, ratio in cell["over"].items()}
                print(*(cell[k] for k in ("model", "format", "routing", "rows")), over, flush=True)
            (out / "kernels-wide.json").write_text(json.dumps(result, indent=1))


WARM_UP = """
import sys, time
import torch
from moe_plugin.kernels.formats import FORMATS
from moe_plugin.runtime.config import BatchedMoEConfig
from moe_plugin.runtime.runner import warm_up
experts, ranks, hidden, inter, top_k, tokens, weights = sys.argv[1:]
config = BatchedMoEConfig(
    num_experts=int(experts), num_ranks=int(ranks), top_k=int(top_k), hidden_size=int(hidden),
    intermediate_size=int(inter), max_num_tokens=int(tokens),
)
torch.cuda.init()
began = time.monotonic()
kernels = warm_up(config, FORMATS[weights])
print(kernels, time.monotonic() - began)
"""


def run_compile(out: Path, models: list[int], formats: Sequence[Format]) -> None:
    """What the server does before it says ready, in a fresh process each time."""
    result: dict[str, Any] = {"environment": environment(), "plans": []}
    for index in models:
        model = MODELS[index]
        for fmt in formats:
            numbers = (model.experts * model.ranks, model.ranks, model.hidden, model.inter,
                       model.top_k, TOKENS)  # fmt: skip
            command = [sys.executable, "-P", "-c", WARM_UP, *map(str, numbers), fmt.name]
            entry: dict[str, Any] = {"model": model.name, "format": fmt.name, "tokens": TOKENS}
            with tempfile.TemporaryDirectory() as cache:
                env = {**os.environ, "TRITON_CACHE_DIR": cache}
                for state in ("cold", "warm"):
                    done = subprocess.run(
                        command, env=env, capture_output=True, text=True, check=True
                    )
                    kernels, seconds = done.stdout.split()[-2:]
                    entry |= {"kernels": int(kernels), f"{state}_s": round(float(seconds), 2)}
            result["plans"].append(entry)
            print(entry, flush=True)
            (out / "kernels-compile.json").write_text(json.dumps(result, indent=1))


def main() -> None:
    """Parse and run one stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--models", type=int, nargs="+", default=list(range(len(MODELS))))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rows", type=int, nargs="+", help="per expert")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--seconds", type=float, default=0, help="of tuning, stage packed")
    parser.add_argument("--fused-rows", type=int, nargs="*", default=[8, 64, 512])
    args = parser.parse_args()
    # Both baselines compile when first called: the host's fused MoE took half a minute.
    watchdog = Watchdog(120 if args.stage in ("bars", "wide", "packed") else 30)
    torch.manual_seed(0)
    formats = [FORMATS[name] for name in args.formats]
    if args.stage == "bars":  # the baselines read no packed weights: stage `packed`
        formats = [fmt for fmt in formats if not fmt.packed]
    where = args.out, args.models, formats
    if args.stage == "check":
        raise SystemExit(not run_checks(formats, watchdog))
    if args.stage == "sweep":
        run_sweep(*where, args.rows or ROW_COUNTS, watchdog)
    elif args.stage == "eager":
        run_eager(*where, args.rows or EAGER_ROWS, watchdog)
    elif args.stage == "wide":
        run_wide(*where, args.rows or LIVE_ROWS, args.routings, watchdog)
    elif args.stage == "packed":
        run_packed(
            args.out, args.models, [f for f in formats if f.packed], args.rows or PACKED_ROWS,
            environment(), args.seconds, watchdog,
        )  # fmt: skip
    elif args.stage == "compile":
        run_compile(*where)
    else:
        run_bars(*where, args.rows or ROWS, args.routings, args.fused_rows, watchdog)


if __name__ == "__main__":
    main()
