"""Hardware counters of both GEMMs of a layer, ours beside DeepGEMM's: `counters.py --out DIR`.

It runs itself under Nsight Compute (`ncu`, on the path), which replays each kernel until all
counters are read; so times are only good for comparing. Clocks are left alone.
"""

import argparse
import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from cases import MODELS, PACKED_MODELS, model_shape
from deepgemm import layer_call
from environment import environment
from kernel_cases import ROUTINGS
from packed import shape_of

from moe_plugin.kernels.experts import batched_experts
from moe_plugin.kernels.formats import BF16, FORMATS, FP8_BLOCK
from moe_plugin.kernels.tuning.tune import Buffers

SECTIONS = (
    "SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "SchedulerStats",
    "WarpStateStats", "LaunchStats", "Occupancy",
)  # fmt: skip
METRICS = (
    "regex:sm__(inst_executed_)?pipe_tensor.*pct_of_peak_sustained_active",
    "lts__t_bytes.sum.per_second", "lts__t_sectors_op_read.sum", "dram__bytes_read.sum",
    "l1tex__data_bank_reads.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_bank_writes.avg.pct_of_peak_sustained_elapsed",
)  # fmt: skip
KEPT = re.compile(
    r"pct_of_peak|per_second|gpu__time_duration.sum|issue_stalled.*ratio|issue_active|bytes.*sum"
    r"|sectors_op_read.sum|registers_per_thread|launch__grid_size"
)
INNER_LIMIT_S = 280


def inner(model: int, name: str, rows: int, routing: str) -> None:
    """Under `ncu`: one layer of ours and one of DeepGEMM's, where it has the format; compiled
    before counters are read."""
    fmt = FORMATS[name]
    shape = shape_of(model, fmt) if fmt.packed else model_shape(model, fmt, rows)
    buffers = Buffers.create(shape)
    counts = torch.tensor(ROUTINGS[routing](shape.experts, rows, shape.capacity), device="cuda")
    counts = counts.to(torch.int32)
    layer = buffers.layers[0]
    for profiled in (False, True):
        torch.cuda.synchronize()
        if profiled:
            torch.cuda.profiler.start()
        batched_experts(*layer, counts, rows, out=buffers.out)
        if shape.format in (BF16, FP8_BLOCK):  # what DeepGEMM reads
            layer_call(layer, counts, rows)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def rows_of(output: str) -> list[dict[str, Any]]:
    """Kernels of `ncu --csv --page raw` with the counters that are kept, and their units."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(f"ncu wrote no table: {output[-1500:]}")
    units, *kernels = csv.DictReader(io.StringIO("\n".join(lines[start:])))
    found = []
    for kernel in kernels:
        kept = {
            f"{name} [{units[name]}]": float(value.replace(",", ""))
            for name, value in kernel.items()
            if KEPT.search(name) and re.fullmatch(r"[\d.,e+-]+", value or "")
        }
        found.append({"kernel": kernel["Kernel Name"][:120], **kept})
    return found


def main() -> None:
    """Every cell that is asked for, a process each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=int, default=0, help="as in stages bars and packed")
    parser.add_argument("--format", choices=FORMATS, default="fp8_block")
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--routing", choices=ROUTINGS, default="uniform")
    parser.add_argument("--inner", action="store_true", help="run by ncu")
    args = parser.parse_args()
    if args.inner:
        inner(args.model, args.format, args.rows[0], args.routing)
        return
    models = PACKED_MODELS if FORMATS[args.format].packed else MODELS
    report: dict[str, Any] = {
        "command": "python3 counters.py " + " ".join(sys.argv[1:]), "environment": environment(),
        "model": models[args.model].name, "format": args.format, "routing": args.routing,
        "rows": {},
    }  # fmt: skip
    options = [part for section in SECTIONS for part in ("--section", section)]
    for rows in args.rows:
        cell = ("--model", str(args.model), "--format", args.format, "--rows", str(rows))
        command = [
            "ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv",
            "--page", "raw", *options, "--metrics", ",".join(METRICS),
            sys.executable, __file__, "--inner", "--out", str(args.out), *cell,
            "--routing", args.routing,
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INNER_LIMIT_S)
            report["rows"][rows] = rows_of(done.stdout)
        except (ValueError, subprocess.TimeoutExpired) as error:
            report["rows"][rows] = f"{error}"[-2000:]
        print(rows, json.dumps(report["rows"][rows], indent=1), flush=True)
        (args.out / "kernels-counters.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
