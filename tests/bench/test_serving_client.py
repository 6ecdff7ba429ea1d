"""The serving benchmark's client and its loads, against a stand-in for a server."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from aiohttp import web

sys.path += [
    str(Path(__file__).parents[2] / "benchmarks" / "serving"),
    str(Path(__file__).parents[2] / "benchmarks"),
    str(Path(__file__).parents[1] / "support"),
]
import loads
import streams
from counts import Counts

TOKEN_S = 0.002
SENT: list[tuple[float, int]] = []
"""When `_stream` sent how many tokens, on the client's clock."""


async def _stream(request: web.Request) -> web.StreamResponse:
    """A token every TOKEN_S; the first alone, the rest in the groups that were asked for."""
    asked = (await request.json())["sampling_params"]
    reply = web.StreamResponse()
    await reply.prepare(request)
    seen, total, group = 0, asked["max_new_tokens"], asked["stream_interval"]
    while seen < total:
        more = 1 if seen == 0 else min(group, total - seen)
        await asyncio.sleep(TOKEN_S * more)
        seen += more
        event = json.dumps({"meta_info": {"completion_tokens": seen}})
        SENT.append((time.perf_counter(), more))
        await reply.write(f"data: {event}\n\n".encode())
    await reply.write(b"data: [DONE]\n\n")
    return reply


async def _silent(_request: web.Request) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


async def _refuse(_request: web.Request) -> web.Response:
    return web.Response(status=500)


async def _counts(
    handler: Any, workers: int, rate: float | None = None
) -> tuple[streams.Job, Counts]:
    app = web.Application(client_max_size=2**22)
    app.router.add_post("/generate", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    job = streams.Job(
        f"http://127.0.0.1:{port}",
        tuple(range(workers)),
        "seed",
        replace(loads.LOADS["short"], patience_s=1.0),
        rate=rate,
        starts=time.perf_counter(),
        lead_s=0.3,
        seconds=1.0,
    )
    try:
        return job, await streams.share_of_round(job)
    finally:
        await runner.cleanup()


def test_client_counts_what_arrives_within_the_window() -> None:
    """Against what was sent within it, but for the groups on their way at either end."""
    SENT.clear()
    job, counts = asyncio.run(_counts(_stream, 8))
    within = sum(tokens for at, tokens in SENT if job.begin <= at < job.end)
    cut_off = 8 * job.stream_interval
    assert counts.lost == 0
    assert abs(counts.tokens - within) <= 2 * cut_off < within / 2
    # A stream's mean time per token: no faster than it was sent, but for a late first event.
    assert counts.between_s
    assert median(counts.between_s) >= 0.9 * TOKEN_S
    assert counts.first_s
    # Of each worker one request may be sent before the window or get its first token after it.
    least, most = job.load.prompt
    firsts = len(counts.first_s)
    assert least * (firsts - 8) <= counts.prompt_tokens <= most * (firsts + 8)
    figures = counts.figures(job.seconds)
    assert figures["total_tokens_per_s"] == counts.tokens + counts.prompt_tokens
    assert figures["ttft_p50_ms"] <= figures["ttft_p95_ms"] <= figures["ttft_p99_ms"]
    assert figures["itl_p99_ms"] >= 1e3 * TOKEN_S


def test_client_counts_refused_requests_as_lost() -> None:
    _, counts = asyncio.run(_counts(_refuse, 2))
    assert counts.lost >= 2
    assert counts.tokens == counts.done == 0
    assert "500" in counts.error


def test_client_counts_requests_that_hang_as_lost() -> None:
    """They neither fail nor end while their round lasts; how long they waited is no less."""
    job, counts = asyncio.run(_counts(_silent, 3))
    assert counts.lost == counts.waiting == 3
    assert "no token in" in counts.error
    assert not counts.first_s  # sent before counting began
    assert job.seconds + streams.GRACE_S > job.load.patience_s


def test_arrivals_at_random_do_not_wait_for_answers() -> None:
    """As many as the rate says, though nobody is answered; those sent meanwhile have waited."""
    job, counts = asyncio.run(_counts(_silent, 2, rate=20.0))
    expected = 2 * 20 * (job.lead_s + job.seconds)
    assert abs(counts.waiting - expected) < 4 * math.sqrt(expected)
    assert 0 < len(counts.first_s) < counts.waiting
    assert max(counts.first_s) >= streams.GRACE_S


def test_prompts_share_what_their_load_says() -> None:
    shared = loads.LOADS["shared"]
    job = streams.Job("", (0,), "seed", shared)
    prompts = [streams.draw(job, random.Random(n), n)[0] for n in range(2 * streams.PREFIXES)]
    begins = {tuple(prompt[: shared.shared]) for prompt in prompts}
    assert len(begins) == streams.PREFIXES
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert shared.prompt[0] <= len(prompt) <= shared.prompt[1]


def test_points_by_name() -> None:
    points = loads.parse(["64", "chat/256", "chat@2.5", "deep"])
    assert [point.name for point in points] == [
        "short/64",
        "chat/256",
        "chat@2.5",
        "deep/1",
        "deep/16",
    ]
    every = [point.name for point in loads.parse(["all"])]
    assert {name.split("/")[0].split("@")[0] for name in every} == set(loads.LOADS)
    assert len(set(every)) == len(every)
    for wrong in ("wide/64", "chat/", "chat@", "/64", ""):
        with pytest.raises(ValueError, match="a point must be"):
            loads.parse([wrong])


def test_kv_cache_holds_what_is_in_flight() -> None:
    """All of a point's mean requests, at least the longest one; for each DP group its share."""
    points = loads.parse(["chat/256", "deep/1"])
    chat, deep = (point.load for point in points)
    assert loads.kv_tokens(points, 1) >= 256 * chat.mean
    assert 128 * chat.mean <= loads.kv_tokens(points, 2) < loads.kv_tokens(points, 1)
    assert loads.kv_tokens(points, 64) >= deep.longest
