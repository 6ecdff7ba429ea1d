"""The real server: ours beside the stock host. `bench.py STAGE --out DIR`.

    start   ours alone, with no flag about sizes: start-up phases, mixed prompts, memory
    up      start variants that stay: phases of the start, mixed prompts, log-probabilities
    rounds  alternating rounds of load against the servers that are up
    client  the host's own bench_serving, with random ids, against the servers that are up
    checks  idle ranks, unequal load and the plan of ours that is up; or a rank killed, by --kill
    soak    random load on ours that is up: nothing may hang or be lost
    trace   what the GPUs do in a second of each point's load, by kinds of kernels
    drift   whether the answers of those that are up get worse under load
    down    stop them by their process ids; what was compiled since they were ready
    pair    up, rounds and down in one
    stock   launches that fail on the stock host: what happens, and after how long
    merge   join the JSON files of several commands, and compare with the bars

Variants, stock: a tensor parallel; t the same with experts in parallel; g attention DP + EP without
an all-to-all; b DeepEP + DeepGEMM with five settings by hand; k megamoe (FP8). Ours: c with no flag
about sizes; d512 with T = 512. With --gpus N every server spans N GPUs; on one GPU there is no t
and no g.

Points: `all`, or loads (short, chat, long, deep, shared) as `chat`, `chat/64` (in flight) or
`chat@16` (a second). Give `up` the points of `rounds`: the KV caches are sized for them.

Each stage prints a short table last and writes one JSON file, cut short as it may be; it names
device, versions, date and its command.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
sys.path.append(str(Path(__file__).parents[2]))  # last: its `kernels/` must hide no package
from alone import stage_start
from client import stage_client
from common import Bench
from drift import stage_drift
from rank_checks import stage_checks
from report import merge, summary
from rounds import stage_rounds
from soak import stage_soak
from starting import stage_down, stage_up
from stock import stage_stock
from streams import STREAM_INTERVAL
from tables import table
from traces import stage_trace
from variants import attention_backend


def stage_pair(bench: Bench) -> None:
    """Everything in one command."""
    try:
        stage_up(bench)
        if not bench.report["failed"]:
            stage_rounds(bench)
    finally:
        stage_down(bench)


STAGES: dict[str, Callable[[Bench], None]] = {
    "start": stage_start,
    "up": stage_up,
    "rounds": stage_rounds,
    "client": stage_client,
    "checks": stage_checks,
    "soak": stage_soak,
    "trace": stage_trace,
    "drift": stage_drift,
    "down": stage_down,
    "pair": stage_pair,
    "stock": stage_stock,
}


def main() -> int:
    """Run one stage."""
    options = _parser().parse_args()
    if options.stage == "merge":
        report = merge(json.loads(path.read_text()) for path in options.files)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(table(report))
        return 0
    bench = Bench(options)
    try:
        STAGES[options.stage](bench)
    finally:
        if "rounds" in bench.report or "startup" in bench.report:
            bench.report["summary"] = summary(bench.report)
        bench.save()
        print(table(bench.report))
    return 1 if bench.report.get("failed") else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stage", choices=(*STAGES, "merge"))
    add("files", type=Path, nargs="*", help="merge: JSON files to join")
    add("--out", type=Path, required=True, help="folder; for merge a file")
    work = Path(tempfile.gettempdir()) / "moe-plugin-serving"
    add("--work", type=Path, default=work, help="logs, caches and state")
    models = "qwen3-bf16, qwen3-fp8-12 (layers), deepseek-v3, tiny (CPU)"
    add("--model", default="qwen3-bf16", help=models)
    add("--variants", nargs="+", default=["a", "b", "c"])
    add("--gpus", type=int, default=1, help="of each server; with tiny, CPU ranks")
    add("--attention-backend", default=attention_backend(), help="default: fa3 if there, or triton")
    add("--kv-tokens", type=int, help="of each DP group; default: what the points need")
    add("--cold", action="store_true", help="up: empty the caches of kernels first")
    add("--one-by-one", action="store_true", help="up: wait for each to be ready")
    add("--quick", action="store_true", help="up: phases and memory alone")
    add("--timeout", type=float, default=400.0, help="up: of one start")
    add("--kill", action="store_true", help="checks: of a rank of ours, instead")
    add("--more", nargs="+", default=[], help="up: more flags for every server")
    add("--points", nargs="+", default=["all"], help="such as chat, chat/64, chat@16; 64: short/64")
    add("--rounds", type=int, default=5)
    add("--seconds", type=float, default=10.0, help="counted in one round; soak: at most")
    add("--steps", type=int, default=10_000, help="soak: of every rank, if there is time")
    add("--lead", type=float, help="seconds of load before counting; default: the load's own")
    add("--warm", action="store_true", help="rounds: no warm-up, the servers had one")
    add("--seldom", nargs="*", default=[], help="variants in fewer rounds")
    add("--seldom-rounds", type=int, default=1, help="their rounds of each point")
    add("--stream-interval", type=int, default=STREAM_INTERVAL, help="tokens per event")
    add("--budget", type=float, default=570.0, help="seconds for this command")
    return parser


if __name__ == "__main__":
    sys.exit(main())
