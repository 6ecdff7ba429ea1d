"""Tokens per second, time to first token and inter-token latency of a few streams."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from ...support.serving.server import Server


@dataclass(frozen=True, slots=True)
class Timed:
    """Of all streams together; milliseconds, but tokens_s.

    Attributes:
        tokens_s: output tokens per second, from the first request to the last token.
        ttft_ms: median time to first token.
        itl_ms: median time between tokens.
        itl_p95_ms: its 95th percentile.
        longest_ms: the longest wait between two tokens.
    """

    tokens_s: float
    ttft_ms: float
    itl_ms: float
    itl_p95_ms: float
    longest_ms: float

    def figures(self) -> dict[str, float]:
        """Rounded, for a record."""
        return {name: round(value, 2) for name, value in asdict(self).items()}


def timed(server: Server, prompts: Sequence[str], new_tokens: int, **more: Any) -> Timed:
    """All prompts at once, each answered with ``new_tokens`` tokens; ``more`` fields in each."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        streams = list(pool.map(lambda text: _stream(server, text, new_tokens, more), prompts))
    seconds = time.perf_counter() - began
    waits = sorted(b - a for times in streams for a, b in pairwise(times[1:]))
    assert all(len(times) == new_tokens + 1 for times in streams), [len(t) - 1 for t in streams]
    return Timed(
        tokens_s=new_tokens * len(prompts) / seconds,
        ttft_ms=1000 * median(times[1] - times[0] for times in streams),
        itl_ms=1000 * median(waits),
        itl_p95_ms=1000 * waits[int(0.95 * (len(waits) - 1))],
        longest_ms=1000 * waits[-1],
    )


def _stream(server: Server, text: str, new_tokens: int, more: Mapping[str, Any]) -> list[float]:
    """When the request was sent, and when each token was there."""
    body: dict[str, Any] = {
        "text": text,
        "stream": True,
        **more,
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": new_tokens,
            "ignore_eos": True,
            "stream_interval": 1,
        },
    }
    request = urllib.request.Request(
        server.url + "/generate",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    times, tokens = [time.perf_counter()], 0
    with urllib.request.urlopen(request, timeout=300) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            now = json.loads(line.removeprefix(b"data: "))["meta_info"]["completion_tokens"]
            times += [time.perf_counter()] * (now - tokens)
            tokens = now
    return times
