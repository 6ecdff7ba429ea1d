"""A closed-loop streaming client: output tokens/s, time to first token, inter-token latency."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from statistics import median

import aiohttp

REQUEST_TIMEOUT_S = 300


@dataclass
class Round:
    """One round of load.

    Attributes:
        concurrency: requests kept in flight.
        seconds: wall time of the round.
        tokens: output tokens received within it.
        lost: requests that failed or came back short.
        first_s: time to first token of each request.
        between_s: mean time between a request's tokens.
    """

    concurrency: int
    seconds: float = 0.0
    tokens: int = 0
    lost: int = 0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """The figures that are kept."""
        return {
            "concurrency": self.concurrency,
            "tokens_per_s": self.tokens / self.seconds,
            "ttft_ms": 1e3 * median(self.first_s) if self.first_s else float("nan"),
            "itl_ms": 1e3 * median(self.between_s) if self.between_s else float("nan"),
            "requests": len(self.first_s),
            "lost": self.lost,
        }


def run_round(url: str, concurrency: int, seconds: float, *, seed: int = 0) -> Round:
    """Keep ``concurrency`` requests in flight for ``seconds``; let the last ones finish."""
    return asyncio.run(_run(url, concurrency, seconds, seed))


async def _run(url: str, concurrency: int, seconds: float, seed: int) -> Round:
    result = Round(concurrency)
    rng = random.Random(seed)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        started = time.perf_counter()
        deadline = started + seconds

        async def worker() -> None:
            while time.perf_counter() < deadline:
                ids = [rng.randrange(5, 250) for _ in range(rng.randrange(32, 129))]
                await _request(session, url, ids, 64, result)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        result.seconds = time.perf_counter() - started
    return result


async def _request(
    session: aiohttp.ClientSession, url: str, ids: list[int], new_tokens: int, result: Round
) -> None:
    body = {
        "input_ids": ids,
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
    }
    sent, first, seen = time.perf_counter(), 0.0, 0
    try:
        async with session.post(f"{url}/generate", json=body) as reply:
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                seen = json.loads(line[6:])["meta_info"]["completion_tokens"]
                first = first or time.perf_counter()
    except (aiohttp.ClientError, asyncio.TimeoutError, KeyError):
        seen = 0
    ended = time.perf_counter()
    if seen < new_tokens:
        result.lost += 1
        return
    result.tokens += seen
    result.first_s.append(first - sent)
    result.between_s.append((ended - first) / (seen - 1))
