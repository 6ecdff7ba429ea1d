"""One client process's share of a round: streams that are read, and what they bring."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from functools import cache
from typing import Any

import aiohttp
from counts import Counts
from loads import LOADS, Load

REQUEST_TIMEOUT_S = 300
STREAM_INTERVAL = 8
GRACE_S = 2.0
TOKEN_IDS = range(5, 251)
PREFIXES = 4  # different ones, where prompts begin alike
_COMPLETION = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclass(frozen=True, slots=True)
class Job:
    """One round, or one process's share of it.

    Attributes:
        url: the server's.
        workers: requests kept in flight, as numbers: each draws its own prompts. With a rate,
            sources that requests arrive from, each at its share of the rate.
        seed: of prompts, lengths and arrivals; the same seed asks every server the same.
        load: lengths.
        rate: requests a second of each worker, sent whether earlier ones have ended or not; None:
            each worker sends its next request when its last has ended.
        starts: when to begin, on ``time.perf_counter``, which all processes share.
        lead_s: load before counting begins.
        seconds: counted.
        stream_interval: tokens per event.
    """

    url: str
    workers: tuple[int, ...]
    seed: str
    load: Load = LOADS["short"]
    rate: float | None = None
    starts: float = 0.0
    lead_s: float = 1.5
    seconds: float = 10.0
    stream_interval: int = STREAM_INTERVAL

    @property
    def begin(self) -> float:
        """When counting begins."""
        return self.starts + self.lead_s

    @property
    def end(self) -> float:
        """When it ends."""
        return self.begin + self.seconds


async def share_of_round(job: Job) -> Counts:
    """Keep the job's workers busy until its time is over."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        share = _Share(job, session)
        await asyncio.sleep(job.starts - time.perf_counter())
        await share.run()
    return share.counts


class _Share:
    """The requests of one process."""

    def __init__(self, job: Job, session: aiohttp.ClientSession) -> None:
        self.job = job
        self.session = session
        self.counts = Counts()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Send until the end; then wait for first tokens, and drop what still runs."""
        one = self._in_flight if self.job.rate is None else self._arrivals
        for number in self.job.workers:
            self._start(one(number))
        await asyncio.sleep(max(0.0, self.job.end - time.perf_counter()))
        if self._tasks:
            # A request with a token ends itself at its next event.
            await asyncio.wait(self._tasks, timeout=GRACE_S)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_flight(self, number: int) -> None:
        """One request after another."""
        # Its own numbers: what a worker asks must not depend on how fast the others are answered.
        rng = random.Random(f"{self.job.seed}/{number}")
        while time.perf_counter() < self.job.end:
            if not await self._ask(rng, number):
                await asyncio.sleep(0.1)  # a server that refuses must not make this loop spin

    async def _arrivals(self, number: int) -> None:
        """A Poisson process: exponential times between requests, answered or not."""
        rng = random.Random(f"{self.job.seed}/{number}")
        at = self.job.starts
        assert self.job.rate is not None
        while (at := at + rng.expovariate(self.job.rate)) < self.job.end:
            await asyncio.sleep(max(0.0, at - time.perf_counter()))
            self._start(self._arrived(random.Random(rng.random()), number))

    async def _arrived(self, rng: random.Random, number: int) -> None:
        await self._ask(rng, number)

    async def _ask(self, rng: random.Random, number: int) -> bool:
        """One request; returns whether it was answered as far as the round lasts."""
        ids, tokens = draw(self.job, rng, number)
        stream = _Stream(self.job, self.counts, len(ids), tokens)
        try:
            problem = await stream.read(self.session, ids)
        except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as error:
            problem = repr(error)
        if problem:
            self.counts.lost += 1
            self.counts.error = problem
        return not problem


def draw(job: Job, rng: random.Random, number: int) -> tuple[list[int], int]:
    """A request's prompt and how many tokens it asks for."""
    shared = list(_prefix(f"{job.seed}/{number % PREFIXES}", job.load.shared))
    own = rng.randint(*job.load.prompt) - len(shared)
    return shared + rng.choices(TOKEN_IDS, k=own), rng.randint(*job.load.new)


@cache
def _prefix(seed: str, tokens: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(TOKEN_IDS, k=tokens))


class _Stream:
    """One request, and what its events add to the counts."""

    def __init__(self, job: Job, counts: Counts, prompt: int, asked: int) -> None:
        self.job = job
        self.counts = counts
        self.prompt = prompt
        self.asked = asked
        self.sent = self.last = time.perf_counter()
        self.seen = 0
        self.within: list[tuple[float, int]] = []

    async def read(self, session: aiohttp.ClientSession, ids: list[int]) -> str:
        """Until it ends, or past the round's end; returns what is wrong with the answer."""
        body = {
            "input_ids": ids,
            "stream": True,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": self.asked,
                "ignore_eos": True,
                "stream_interval": self.job.stream_interval,
            },
        }
        try:
            async with session.post(f"{self.job.url}/generate", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.content:
                    if found := _COMPLETION.search(line):
                        self._event(time.perf_counter(), int(found[1]))
                        if self.last >= self.job.end:
                            return ""
        except asyncio.CancelledError:
            self._dropped()
            raise
        finally:
            self._close()
        if self.seen != self.asked:
            return f"{self.seen} of {self.asked} tokens"
        self.counts.done += self.job.begin <= time.perf_counter() < self.job.end
        return ""

    def _event(self, now: float, tokens: int) -> None:
        if self.seen == 0 and self.job.begin <= self.sent < self.job.end:
            self.counts.first_s.append(now - self.sent)
        if self.job.begin <= now < self.job.end:
            self.counts.tokens += tokens - self.seen
            if self.seen == 0:
                self.counts.prompt_tokens += self.prompt
            elif self.within and tokens > self.seen:
                self.counts.gaps_s.append((now - self.last) / (tokens - self.seen))
            self.within.append((now, tokens))
        self.seen, self.last = tokens, now

    def _dropped(self) -> None:
        """The round is over, and nothing came since."""
        now = time.perf_counter()
        if self.seen == 0:
            self.counts.waiting += 1
            if self.job.begin <= self.sent < self.job.end:
                self.counts.first_s.append(now - self.sent)
        if now - self.last >= self.job.load.patience_s:
            # A request that hangs neither fails nor ends before its round is over.
            self.counts.lost += 1
            self.counts.error = f"no token in {now - self.last:.1f} s"

    def _close(self) -> None:
        if self.within and self.within[-1][1] - self.within[0][1] >= self.job.stream_interval:
            (first, had), (last, have) = self.within[0], self.within[-1]
            self.counts.between_s.append((last - first) / (have - had))
