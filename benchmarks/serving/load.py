"""A closed-loop streaming client: output tokens/s, time to first token, inter-token latency.

What is counted lies between two points in time: a round starts its requests, waits ``lead_s``, then
counts tokens for ``seconds`` and drops what is still running. Nothing depends on how long the last
requests take. Several processes read the streams, so that parsing is not what is measured, and
each request asks for its tokens in groups of ``stream_interval``: one event per token would measure
the host's HTTP process, which all variants share. The first token is sent at once.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import random
import re
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from statistics import median
from types import TracebackType
from typing import Any

import aiohttp

REQUEST_TIMEOUT_S = 300
PROCESSES = 4
STREAM_INTERVAL = 8
PROMPT_TOKENS = (32, 128)
NEW_TOKENS = (64, 192)
"""Bounds; outputs of one length would keep all requests in step."""
TOKEN_IDS = (5, 250)
_COMPLETION = re.compile(rb'"completion_tokens":\s*(\d+)')
_HEAD_START_S = 0.05  # for a job to reach every process before its round begins


@dataclass(frozen=True)
class Job:
    """One round, or one process's share of it.

    Attributes:
        url: the server's.
        workers: requests kept in flight, as numbers: each draws its own prompts.
        seed: of prompts and lengths; the same seed asks every server the same.
        starts: when to begin, on ``time.perf_counter``, which all processes share.
        lead_s: load before counting begins.
        seconds: counted.
        stream_interval: tokens per event.
    """

    url: str
    workers: tuple[int, ...]
    seed: str
    starts: float = 0.0
    lead_s: float = 1.5
    seconds: float = 10.0
    stream_interval: int = STREAM_INTERVAL


@dataclass
class Counts:
    """What was received between the two points in time.

    Attributes:
        tokens: output tokens.
        done: requests that ended, complete.
        lost: requests that failed or ended short, at any time; and workers that heard nothing
            between the two points in time.
        first_s: time to first token of requests sent and answered within.
        between_s: time per token of each stream, between its first and last event within.
        error: of one lost request.
    """

    tokens: int = 0
    done: int = 0
    lost: int = 0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    error: str = ""
    heard: set[int] = field(default_factory=set)
    """Workers with an event, or an error, within."""

    def add(self, other: Counts) -> None:
        """Another process's counts."""
        self.tokens += other.tokens
        self.done += other.done
        self.lost += other.lost
        self.first_s += other.first_s
        self.between_s += other.between_s
        self.error = self.error or other.error


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
        shares = [job.workers[index :: len(self._pipes)] for index in range(len(self._pipes))]
        starts = time.perf_counter() + _HEAD_START_S
        busy = [(pipe, share) for pipe, share in zip(self._pipes, shares, strict=True) if share]
        for pipe, share in busy:
            pipe.send(asdict(job) | {"workers": share, "starts": starts})
        total = Counts()
        for pipe, _ in busy:
            total.add(pipe.recv())
        return {
            "concurrency": len(job.workers),
            "tokens_per_s": total.tokens / job.seconds,
            "ttft_ms": _median_ms(total.first_s),
            "itl_ms": _median_ms(total.between_s),
            "done": total.done,
            "lost": total.lost,
            **({"error": total.error} if total.error else {}),
        }

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


def _median_ms(values: list[float]) -> float | None:
    return 1e3 * median(values) if values else None


def _serve(pipe: Connection) -> None:
    """A client process: rounds until the pipe closes."""
    while True:
        try:
            job = Job(**pipe.recv())
        except EOFError:
            return
        pipe.send(asyncio.run(share_of_round(job)))


async def share_of_round(job: Job) -> Counts:
    """Keep the job's workers busy until its time is over."""
    counts = Counts()
    begin = job.starts + job.lead_s
    end = begin + job.seconds
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
    ) as session:
        await asyncio.sleep(job.starts - time.perf_counter())
        workers = [
            asyncio.create_task(_worker(session, job, number, begin, end, counts))
            for number in job.workers
        ]
        await asyncio.wait(workers, timeout=max(0.0, end - time.perf_counter()))
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    if silent := set(job.workers) - counts.heard:
        # A request that hangs neither fails nor ends before its round is over.
        counts.lost += len(silent)
        counts.error = counts.error or f"no token in {job.seconds} s"
    return counts


async def _worker(
    session: aiohttp.ClientSession, job: Job, number: int, begin: float, end: float, counts: Counts
) -> None:
    # Its own numbers: what a worker asks must not depend on how fast the others are answered.
    rng = random.Random(f"{job.seed}/{number}")
    while time.perf_counter() < end:
        ids = [rng.randint(*TOKEN_IDS) for _ in range(rng.randint(*PROMPT_TOKENS))]
        tokens = rng.randint(*NEW_TOKENS)
        try:
            seen = await _request(session, job, ids, tokens, number, begin, end, counts)
            problem = "" if seen == tokens else f"{seen} of {tokens} tokens"
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            problem = repr(error)
        if problem:
            counts.lost += 1
            counts.error = problem
            counts.heard.add(number)
            await asyncio.sleep(0.1)  # a server that refuses must not make this loop spin


async def _request(
    session: aiohttp.ClientSession,
    job: Job,
    ids: list[int],
    new_tokens: int,
    number: int,
    begin: float,
    end: float,
    counts: Counts,
) -> int:
    body = {
        "input_ids": ids,
        "stream": True,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": new_tokens,
            "ignore_eos": True,
            "stream_interval": job.stream_interval,
        },
    }
    sent, seen = time.perf_counter(), 0
    within: list[tuple[float, int]] = []
    try:
        async with session.post(f"{job.url}/generate", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.content:
                found = _COMPLETION.search(line)
                if found is None:
                    continue
                now, tokens = time.perf_counter(), int(found[1])
                if begin <= now < end:
                    counts.tokens += tokens - seen
                    counts.heard.add(number)
                    within.append((now, tokens))
                if seen == 0 and sent >= begin:
                    counts.first_s.append(now - sent)
                seen = tokens
        counts.done += begin <= time.perf_counter() < end and seen == new_tokens
        return seen
    finally:  # also where the round is over
        if within and within[-1][1] - within[0][1] >= job.stream_interval:
            (first, had), (last, have) = within[0], within[-1]
            counts.between_s.append((last - first) / (have - had))
