"""The real server: ours beside the stock host. `bench.py STAGE --out DIR`.

    start   ours alone, with no flag about sizes: start-up phases, mixed prompts, memory
    up      start variants that stay: phases of the start, mixed prompts, log-probabilities
    rounds  alternating rounds of load against the servers that are up
    checks  idle ranks, unequal load and the plan of ours that is up; or a rank killed, by --kill
    drift   whether the answers of those that are up get worse under load
    down    stop them by their process ids; what was compiled since they were ready
    pair    up, rounds and down in one
    stock   launches that fail on the stock host: what happens, and after how long
    merge   join the JSON files of several commands, and compare with the bars

Variants: a stock without all-to-all; b stock DeepEP + DeepGEMM with five settings by hand; c ours;
d512 ours with T = 512; e ours with mixed steps eager. With --gpus N every server spans N GPUs.

Each stage prints a short table last and writes one JSON file, cut short as it may be; it names
device, versions and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))
sys.path.append(str(Path(__file__).parents[2]))  # last: its `kernels/` must hide no package
import served
import startup
from load import STREAM_INTERVAL, Clients, Job
from package_versions import package_versions
from report import Report, merge, summary, table
from servers import Detached, launch, load_state, save_state
from serving.server import COMMON_ARGS
from variants import RESIDENT, SLIM, variant

BEGAN = time.monotonic()
WARM_UP_S = 0.5
LOG_BYTES = 400_000
ROOM = 24 * 2**30  # for a model in memory, and as much again
WORK = Path(tempfile.gettempdir()) / "moe-plugin-serving"


def environment() -> dict[str, str]:
    """What a figure depends on."""
    return {
        "device": _smi("name") or _torch_name(),
        "date": datetime.date.today().isoformat(),
        **package_versions("sglang", "torch", "triton", "sgl-deep-ep", "sgl-deep-gemm"),
    }


def _smi(field: str) -> str:
    """One field of nvidia-smi: asking torch would take memory that the servers share."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0]


def _torch_name() -> str:
    """The device's name where there is no nvidia-smi; in a process that gives its memory back."""
    code = (
        "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    return (done.stdout.split("\n") or ["unknown"])[0] or "unknown"


class Bench:
    """One command: its options, and the report that it writes as it grows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cpu = options.model == "tiny"
        self.stamp = datetime.datetime.now().strftime("%H%M%S")
        self.report: Report = {
            "environment": environment(),
            "model": options.model,
            "gpus": options.gpus,
            "commands": [" ".join(sys.argv[1:])],
        }
        options.work.mkdir(parents=True, exist_ok=True)
        options.out.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        """Write the report; called after every step, since commands may be cut short."""
        path = self.options.out / f"serving-{self.options.stage}-{self.stamp}.json"
        path.write_text(json.dumps(self.report, indent=1))

    def model(self) -> Path:
        """The checkpoint, written unless it is there."""
        began = time.monotonic()
        if self.cpu:
            from serving.checkpoint import write_checkpoint

            folder = self.options.work / "tiny"
            if not folder.exists():
                write_checkpoint(folder)
            return folder
        folder = self.written(self.options.model)
        self.report["model_written_s"] = round(time.monotonic() - began, 1)
        return folder

    @staticmethod
    def written(name: str) -> Path:
        """A model's folder; written by a process of its own, whose GPU memory goes with it."""
        memory, temporary = (
            Path(f) / f"moe-plugin-{name}" for f in ("/dev/shm", tempfile.gettempdir())
        )
        for folder in (memory, temporary):
            if (folder / "written").exists():
                return folder
        roomy = memory.parent.is_dir() and shutil.disk_usage(memory.parent).free > ROOM
        folder = memory if roomy else temporary
        here = Path(__file__).parent
        paths = [
            str(here),
            str(here.parents[1] / "tests" / "support"),
            os.environ.get("PYTHONPATH", ""),
        ]
        subprocess.run(
            [sys.executable, "-P", str(here / "models.py"), name, str(folder), "cuda"],
            env={**os.environ, "PYTHONPATH": ":".join(filter(None, paths))},
            check=True,
        )
        return folder

    def launch(self, name: str, model: Path, common: Sequence[str]) -> Detached:
        """Start one variant as the options say."""
        options = self.options
        return launch(
            variant(name, cpu=self.cpu, gpus=options.gpus),
            model,
            options.work,
            (*common, *options.more),
            cold=options.cold,
            cpu_ranks=options.gpus if self.cpu else 0,
        )

    def up(self) -> None:
        """Start variants together, or one by one, beside those that are up."""
        options, folder = self.options, self.model()
        common = (*COMMON_ARGS,) if self.cpu else (*SLIM, *RESIDENT)
        running = load_state(options.work)
        groups = [[name] for name in options.variants]
        if not options.one_by_one:
            groups = [options.variants]
        self.report |= {"startup": [], "failed": [], "served": [], "memory": {}}
        for group in groups:
            watches = []
            for name in group:
                server = self.launch(name, folder, common)
                watches.append(startup.Watch(server, time.monotonic()))
                running.append(server)
                save_state(options.work, running)  # before anything can fail
            self.report["failed"] += startup.wait_ready(watches, options.timeout)
            self.report["startup"] += [startup.describe(watch) for watch in watches]
            save_state(options.work, running)
            for watch in watches:
                if watch.ready_s is not None:
                    self.serve(watch.server, alone=len(group) == 1)
            self.save()
        self.report["device_memory_used"] = _smi("memory.used")
        if not options.quick:
            self.distances(running)

    def serve(self, server: Detached, *, alone: bool) -> None:
        """First requests, mixed prompts and planned memory of one server."""
        name = server.record.variant
        if not self.options.quick:
            answered = served.mixed(server, 1000 if self.cpu else 4000)
            self.report["served"].append({"variant": name, **answered})
        if (row := served.memory(server, alone=alone)) is not None:
            self.report["memory"][name] = row

    def distances(self, running: Sequence[Detached]) -> None:
        """How far apart the servers' log-probabilities are; the first twice, for the noise."""
        ready = [s for s in running if s.alive() and s.answers()]
        if not ready:
            return
        values = {"again": served.forced(ready[0])}
        values |= {server.record.variant: served.forced(server) for server in ready}
        self.report["logprob_distance"] = served.distances(values)
        self.save()

    def rounds(self) -> None:
        """Alternating rounds of load, point by point, while there is time."""
        options = self.options
        running = {s.record.variant: s for s in load_state(options.work)}
        names = [name for name in options.variants if name in running]
        often = options.seldom_rounds
        self.report |= {"rounds": [], "skipped": []}
        with Clients() as clients:
            for point in options.points:
                for name in names:
                    self.round(clients, running[name], point, f"warm-up/{point}", WARM_UP_S)
                for index in range(options.rounds):
                    present = [n for n in names if n not in options.seldom or index < often]
                    need = len(present) * (options.seconds + options.lead + 0.5)
                    if time.monotonic() - BEGAN + need > options.budget:
                        self.report["skipped"].append(f"from round {index} at {point}: no time")
                        return
                    for name in present if index % 2 == 0 else present[::-1]:
                        key = f"{self.stamp}/{point}/{index}"
                        measured = self.round(clients, running[name], point, key, options.seconds)
                        self.report["rounds"].append({"variant": name, "key": key, **measured})
                        self.save()

    def round(
        self, clients: Clients, server: Detached, point: int, key: str, seconds: float
    ) -> dict[str, Any]:
        """One round; afterwards nothing runs and no prefix is kept."""
        job = Job(
            server.url,
            tuple(range(point)),
            key,
            lead_s=self.options.lead,
            seconds=seconds,
            stream_interval=self.options.stream_interval,
        )
        measured = clients.round(job)
        server.idle()
        return measured

    def compiled(self) -> None:
        """Files that appeared in the caches since each server was ready."""
        self.report["compiled"] = [s.compiled() for s in load_state(self.options.work)]

    def down(self) -> None:
        """Stop the servers that are up; keep the ends of their logs."""
        running = load_state(self.options.work)
        states = [{"variant": s.record.variant, "alive": s.alive()} for s in running]
        self.report["stopped"] = states
        self.compiled()
        with ThreadPoolExecutor() as pool:
            list(pool.map(Detached.stop, running))
        log = self.options.out / f"serving-{self.stamp}.log"
        log.write_text("\n".join(f"== {s.record.title}\n{s.tail(LOG_BYTES)}" for s in running))
        save_state(self.options.work, [])

    def pair(self) -> None:
        """Everything in one command."""
        try:
            self.up()
            if not self.report["failed"]:
                self.rounds()
        finally:
            self.down()


def main() -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = ("start", "up", "rounds", "checks", "drift", "down", "pair", "stock", "merge")
    parser.add_argument("stage", choices=stages)
    parser.add_argument("files", type=Path, nargs="*", help="merge: JSON files to join")
    parser.add_argument("--out", type=Path, required=True, help="folder; for merge a file")
    parser.add_argument("--work", type=Path, default=WORK, help="logs, caches and state")
    parser.add_argument(
        "--model",
        default="qwen3-bf16",
        help="qwen3-fp8, qwen3-bf16-16 (layers), deepseek-v3, tiny (CPU)",
    )
    parser.add_argument("--variants", nargs="+", default=["a", "b", "c"])
    parser.add_argument("--gpus", type=int, default=1, help="of each server; with tiny, CPU ranks")
    parser.add_argument("--cold", action="store_true", help="up: empty the caches of kernels first")
    parser.add_argument("--one-by-one", action="store_true", help="up: wait for each to be ready")
    parser.add_argument("--quick", action="store_true", help="up: phases and memory alone")
    parser.add_argument("--timeout", type=float, default=400.0, help="up: of one start")
    parser.add_argument("--kill", action="store_true", help="checks: of a rank of ours, instead")
    parser.add_argument("--more", nargs="+", default=[], help="up: more flags for every server")
    parser.add_argument("--points", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="counted in one round")
    parser.add_argument("--lead", type=float, default=1.0, help="load before counting begins")
    parser.add_argument("--seldom", nargs="*", default=[], help="variants in fewer rounds")
    parser.add_argument("--seldom-rounds", type=int, default=1, help="their rounds of each point")
    parser.add_argument("--stream-interval", type=int, default=STREAM_INTERVAL)
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for this command")
    options = parser.parse_args()
    if options.stage == "merge":
        report = merge(json.loads(path.read_text()) for path in options.files)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(table(report))
        return 0
    # Here, since `merge` needs none of what they import.
    import alone
    import drift
    import rank_checks
    import stock

    stages_of_their_own = {
        "start": alone.stage_start,
        "stock": stock.stage_stock,
        "checks": rank_checks.stage_checks,
        "drift": drift.stage_drift,
    }
    bench = Bench(options)
    try:
        if stage := stages_of_their_own.get(options.stage):
            stage(bench)
        else:
            getattr(bench, options.stage)()
    finally:
        if "rounds" in bench.report or "startup" in bench.report:
            bench.report["summary"] = summary(bench.report)
        bench.save()
        print(table(bench.report))
    return 1 if bench.report.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
