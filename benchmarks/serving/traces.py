"""Stage `trace`: what the GPUs do in a second of load, by kinds of kernels.

The host's own profiler writes a trace of each rank while a point's load runs; its kernels are
sorted by name. What a rank's kernels do not cover is time in which its GPU waits for the CPU.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import Bench
from load import Clients, job_at
from servers import Detached, load_state

SECONDS = 1.0
STARTS_WITHIN_S = 6.0  # a server's first profile takes about three to begin
LONGEST_WRITE_S = 60.0
NAMES_KEPT = 14
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")

KINDS: Mapping[str, re.Pattern[str]] = {
    kind: re.compile(pattern, re.IGNORECASE)
    for kind, pattern in {
        "all-to-all": "deep_ep|internode_ll|intranode",
        "collectives": "nccl|cross_device_reduce|all_?reduce|all_?gather|reduce_?scatter|one_?shot",
        "attention": "flash|fmha|_fwd_kernel|_fwd_grouped|decode_att|extend_att|mla",
        "experts": r"experts_kernel|masked_gemm|fused_moe|grouped|mega_?moe|GemmType\)[12]",
        "dense products": "gemm|nvjet|cublas|cutlass|gemv",
    }.items()
}
"""The first that is found in a kernel's name; everything else is `other`."""


def kind_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(kernel)), "other")


def stage_trace(bench: Bench) -> None:
    """Every point for every variant that is asked for, a trace of each rank."""
    up = {server.record.variant: server for server in load_state(bench.options.work)}
    rows = bench.report.setdefault("traces", [])
    bench.report["failed"] = []
    with Clients() as clients, ThreadPoolExecutor(1) as pool:
        for point in bench.points:
            for name in bench.options.variants:
                if (server := up.get(name)) is None:
                    continue
                folder = bench.options.work / f"trace-{bench.stamp}-{name}-{len(rows)}"
                job = job_at(
                    point,
                    server.url,
                    f"trace/{bench.stamp}/{point.name}",
                    lead_s=point.load.lead_s,
                    seconds=SECONDS + STARTS_WITHIN_S,
                    stream_interval=bench.options.stream_interval,
                )
                running = pool.submit(clients.round, job)
                time.sleep(point.load.lead_s)
                try:
                    ranks = _traced(server, folder, bench.options.gpus)
                except (OSError, ValueError) as error:
                    bench.report["failed"].append(f"{name} at {point.name}: {error}")
                    ranks = []
                measured = running.result()
                server.idle()
                shutil.rmtree(folder, ignore_errors=True)
                lost = {"lost": measured["lost"]}
                rows.append({"variant": name, "point": point.name, **lost, "ranks": ranks})
                bench.save()
                print(name, point.name, json.dumps([rank["ms"] for rank in ranks]), flush=True)


def _traced(server: Detached, folder: Path, ranks: int) -> list[dict[str, Any]]:
    """A second's kernels of each rank, in the order of the files' names.

    Raises:
        OSError: fewer traces were written than there are ranks.
        ValueError: one has no kernels: the load was over before the profiler began.
    """
    server.post("/start_profile", {"output_dir": str(folder), "activities": ["GPU"]})
    time.sleep(SECONDS)
    server.post("/stop_profile", {})
    found = [summarised(_events(path)) for path in _written(folder, ranks)]
    if not all(rank["ms"]["busy"] for rank in found):
        raise ValueError("a trace without kernels")
    return found


def _written(folder: Path, ranks: int) -> list[Path]:
    """The traces, once their sizes stand still: who asked is answered before all are written."""
    sizes: list[int] = []
    until = time.monotonic() + LONGEST_WRITE_S
    while time.monotonic() < until:
        files = sorted(folder.glob("*.json.gz"))
        now = [path.stat().st_size for path in files]
        if len(now) >= ranks and now == sizes:
            return files
        sizes = now
        time.sleep(1.0)
    raise OSError(f"{len(sizes)} of {ranks} traces were written within {LONGEST_WRITE_S:.0f} s")


def _events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def summarised(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Milliseconds of each kind of kernel, of what the GPU was busy with, and of the whole.

    Kernels of several streams overlap, so that the kinds' sum may be more than what was busy.
    """
    work = sorted((e["ts"], e["dur"], e["name"]) for e in events if e.get("cat") in GPU_WORK)
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    busy = end = 0.0
    for start, duration, name in work:
        kinds[kind_of(name)] += duration
        names[name] += duration
        busy += max(0.0, start + duration - max(end, start))
        end = max(end, start + duration)
    whole = end - work[0][0] if work else 0.0
    return {
        "ms": {
            "whole": _ms(whole),
            "busy": _ms(busy),
            **{kind: _ms(duration) for kind, duration in kinds.most_common()},
        },
        "longest": {name[:160]: _ms(duration) for name, duration in names.most_common(NAMES_KEPT)},
    }


def _ms(microseconds: float) -> float:
    return round(microseconds / 1e3, 2)
