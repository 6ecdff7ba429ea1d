"""Stages `up` and `down`: servers that stay until they are stopped by their process ids."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import served
import startup
from common import Bench
from machine import smi
from servers import Detached, load_state, save_state

LOG_BYTES = 400_000


def stage_up(bench: Bench) -> None:
    """Start variants together, or one by one, beside those that are up."""
    options, folder, report = bench.options, bench.model(), bench.report
    running = load_state(options.work)
    together = [[name] for name in options.variants] if options.one_by_one else [options.variants]
    report |= {"startup": [], "failed": [], "served": [], "memory": {}}
    for names in together:
        watches = []
        for name in names:
            launched = bench.variant(name)
            server = bench.launch(launched, folder, bench.shared_args(launched))
            watches.append(startup.Watch(server, time.monotonic()))
            running.append(server)
            save_state(options.work, running)  # before anything can fail
        report["failed"] += startup.wait_ready(watches, options.timeout)
        report["startup"] += [startup.describe(watch) for watch in watches]
        save_state(options.work, running)
        for watch in watches:
            if watch.ready_s is not None:
                _serve(bench, watch.server, alone=len(names) == 1)
        bench.save()
    report["device_memory_used"] = smi("memory.used")
    if not options.quick:
        _distances(bench, running)


def _serve(bench: Bench, server: Detached, *, alone: bool) -> None:
    """First requests, mixed prompts and planned memory of one server."""
    name = server.record.variant
    if not bench.options.quick:
        answered = served.mixed(server, 1000 if bench.cpu else 4000)
        bench.report["served"].append({"variant": name, **answered})
    if (row := served.memory(server, alone=alone)) is not None:
        bench.report["memory"][name] = row


def _distances(bench: Bench, running: Sequence[Detached]) -> None:
    """How far apart the servers' log-probabilities are; the first twice, for the noise."""
    ready = [server for server in running if server.alive() and server.answers()]
    if not ready:
        return
    values = {"again": served.forced(ready[0])}
    values |= {server.record.variant: served.forced(server) for server in ready}
    bench.report["logprob_distance"] = served.distances(values)
    bench.save()


def stage_down(bench: Bench) -> None:
    """Stop the servers that are up; what was compiled meanwhile, and the ends of their logs."""
    running = load_state(bench.options.work)
    states = [{"variant": s.record.variant, "alive": s.alive()} for s in running]
    bench.report["stopped"] = states
    bench.report["compiled"] = [server.compiled() for server in running]
    with ThreadPoolExecutor() as pool:
        list(pool.map(Detached.stop, running))
    log = bench.options.out / f"serving-{bench.stamp}.log"
    log.write_text("\n".join(f"== {s.record.title}\n{s.tail(LOG_BYTES)}" for s in running))
    save_state(bench.options.work, [])
