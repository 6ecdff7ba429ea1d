"""Stage `rounds`: alternating rounds of load against the servers that are up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common import Bench
from load import Clients, job_at
from loads import Point
from servers import Detached, load_state
from serving.server import ServerDied
from streams import GRACE_S

WARM_UP_S = 3.0  # behind the load's own lead: until its shapes have been met
BETWEEN_S = 0.5  # until nothing runs


def stage_rounds(bench: Bench) -> None:
    """A round of every point for every variant, and again, while there is time.

    A variant and its rivals take turns at each point, in the other order every second round. Rounds
    of all points come before the next ones: whatever drifts, or ends the command, meets all alike.
    """
    options, points = bench.options, bench.points
    up = {server.record.variant: server for server in load_state(options.work)}
    running = {name: up[name] for name in options.variants if name in up}
    report = bench.report
    report |= {"rounds": [], "skipped": [], "failed": []}
    with Clients() as clients:
        runner = _Runner(bench, clients, running)
        if not options.warm:
            for point in _largest(points):
                for name in list(running):
                    key = f"warm-up/{point.name}"
                    runner.run(name, point, key, lead_s=point.load.lead_s, seconds=WARM_UP_S)
        for index in range(options.rounds):
            for point in points:
                names = [
                    name for name in running
                    if name not in options.seldom or index < options.seldom_rounds
                ]  # fmt: skip
                lead = point.load.lead_s if options.lead is None else options.lead
                need = len(names) * (options.seconds + lead + GRACE_S + BETWEEN_S)
                if need > bench.left_s():
                    report["skipped"].append(f"from round {index} at {point.name}: no time")
                    return
                key = f"{bench.stamp}/{point.name}/{index}"
                for name in names if index % 2 == 0 else names[::-1]:
                    found = runner.run(name, point, key, lead_s=lead, seconds=options.seconds)
                    if found is not None:
                        report["rounds"].append({"variant": name, "key": key, **found})
                    bench.save()


def _largest(points: Iterable[Point]) -> list[Point]:
    """The point of each load with the most requests: shapes of all others occur on the way."""
    largest: dict[str, Point] = {}
    for point in points:
        if point.requests >= largest.setdefault(point.load.name, point).requests:
            largest[point.load.name] = point
    return list(largest.values())


class _Runner:
    """Runs rounds; a server that fails takes part in no more of them."""

    def __init__(self, bench: Bench, clients: Clients, running: dict[str, Detached]) -> None:
        self.bench = bench
        self.clients = clients
        self.running = running

    def run(
        self, name: str, point: Point, key: str, *, lead_s: float, seconds: float
    ) -> dict[str, Any] | None:
        """One round; afterwards nothing runs and no prefix is kept. None: its server failed."""
        if (server := self.running.get(name)) is None:
            return None
        interval = self.bench.options.stream_interval
        job = job_at(
            point, server.url, key, lead_s=lead_s, seconds=seconds, stream_interval=interval
        )
        logged = server.log_bytes()
        measured = self.clients.round(job)
        try:
            server.idle()
        except (ServerDied, OSError) as error:
            self.bench.report["failed"].append(f"{name} at {key}: {error}")
            measured["lost"] += max(1, measured["waiting"])
            del self.running[name]
        replayed = server.prefills(logged)
        kind = {"rate": point.rate} if point.rate is not None else {"concurrency": point.requests}
        return {
            "point": point.name,
            "load": point.load.name,
            **kind,
            "stream_interval": job.stream_interval,
            "lead_s": lead_s,
            "seconds": seconds,
            **measured,
            "prefill_batches": len(replayed),
            "prefill_eager": replayed.count(False),
        }
