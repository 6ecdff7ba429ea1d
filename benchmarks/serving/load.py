"""Client processes that put a load on a server, and count what comes back in a round.

What is counted lies between two points in time: a round starts its requests, waits ``lead_s``, then
counts tokens for ``seconds``. Nothing depends on how long the last requests take, but the first
tokens of those sent meanwhile are waited for, for a moment. Several processes read the streams, so
that parsing is not what is measured, and each request asks for its tokens in groups of
``stream_interval``: one event per token would measure the host's HTTP process, which all variants
share. The first token is sent at once.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from counts import Counts
from loads import Point
from streams import Job, share_of_round

PROCESSES = 4
_HEAD_START_S = 0.05  # for a job to reach every process before its round begins


def job_at(
    point: Point, url: str, seed: str, *, lead_s: float, seconds: float, stream_interval: int
) -> Job:
    """A round of a point's load on the server at ``url``."""
    workers = range(point.requests if point.rate is None else PROCESSES)
    return Job(
        url,
        tuple(workers),
        seed,
        point.load,
        rate=point.rate,
        lead_s=lead_s,
        seconds=seconds,
        stream_interval=stream_interval,
    )


class Clients:
    """Client processes that are started once and reused by every round."""

    def __init__(self, processes: int = PROCESSES) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def round(self, job: Job) -> dict[str, Any]:
        """Run one round; returns the figures that are kept."""
        workers = job.workers
        shares = [workers[index :: len(self._pipes)] for index in range(len(self._pipes))]
        starts = time.perf_counter() + _HEAD_START_S
        busy = [(pipe, share) for pipe, share in zip(self._pipes, shares, strict=True) if share]
        for pipe, share in busy:
            rate = job.rate / len(workers) if job.rate is not None else None
            pipe.send(replace(job, workers=share, rate=rate, starts=starts))
        total = Counts()
        for pipe, _ in busy:
            total.add(pipe.recv())
        if total.tokens == 0:  # nobody was answered, however patient
            total.lost = max(total.lost, total.waiting)
        return total.figures(job.seconds)

    def __enter__(self) -> Clients:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)


def _serve(pipe: Connection) -> None:
    """A client process: rounds until the pipe closes."""
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(asyncio.run(share_of_round(job)))
