"""A public client: the OpenAI SDK, streaming chats with tools, some of them left half read."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from importlib.util import find_spec
from typing import Any

import psutil
import pytest

from ...support.rank_killed import scheduler_pids
from ...support.serving.prompts import long_prompt
from ...support.serving.server import Server
from .machine import (
    LONG,
    ON_CPU,
    OURS,
    QWEN3,
    device_gib,
    largest_rows,
    on_two_gpus,
    ready,
    sharing,
    start,
    turn,
)
from .records import See

FEATURE = "a public client"
pytestmark = [
    *on_two_gpus,
    *(
        pytest.mark.skipif(find_spec(name) is None, reason=f"requires the {name} package")
        for name in ("openai", "jiter")  # with which it reads streams
    ),
]

SECONDS = float(os.environ.get("FEATURES_CLIENT_S", "30"))
CLIENTS = 4 if ON_CPU else 32
WARM_S = 5.0
MOST_GROWTH = 1.1
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
SERVED = sharing(QWEN3, *OURS, "--chat-template", "chatml", "--tool-call-parser", "qwen25")


def test_streaming_chats_with_tools_and_aborts(seen: See) -> None:
    """Nothing is lost, and memory at the end is that of the beginning."""
    with start(SERVED) as server:
        ready(server)
        with turn():
            asyncio.run(_run(server, WARM_S))
            before = _memory(server)
            counts, problems = asyncio.run(_run(server, SECONDS))
            time.sleep(1)
            after = _memory(server)
            rows = largest_rows(server)
        log = server.log()
    assert not problems, problems[:5]
    assert counts["whole"] > 2 * CLIENTS
    assert min(counts["left"], counts["with tools"]) > 0
    assert "leak" not in log
    grown = {name: after[name] / before[name] for name in before}
    assert max(grown.values()) <= MOST_GROWTH, (before, after)
    seen(
        f"OpenAI SDK, {CLIENTS} clients for {SECONDS:.0f} s: {counts['whole']} streamed chats, "
        f"{counts['left']} left half read, {counts['with tools']} with tools; no request lost, "
        f"memory {max(grown.values()):.3f} of that at the start",
        rows=rows,
        counts=dict(counts),
        before=before,
        after=after,
    )


async def _run(server: Server, seconds: float) -> tuple[Counter[str], list[str]]:
    import openai

    counts: Counter[str] = Counter()
    problems: list[str] = []
    over = time.monotonic() + seconds
    client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="none", timeout=120)

    async def one(index: int) -> None:
        rng = random.Random(index)
        while time.monotonic() < over and not problems:
            try:
                await _chat(client, rng, counts)
            except Exception as error:
                problems.append(repr(error))

    await asyncio.gather(*(one(index) for index in range(CLIENTS)))
    await client.close()
    return counts, problems


async def _chat(client: Any, rng: random.Random, counts: Counter[str]) -> None:
    tokens, wanted = rng.choice((10, 100, 400, LONG)), rng.randint(4, 120)
    skip = rng.randrange(500)
    more: dict[str, Any] = {}
    if rng.random() < 0.3:
        more = {"tools": [TOOL], "tool_choice": "auto"}
        counts["with tools"] += 1
    leaves = rng.random() < 0.25
    stream = await client.chat.completions.create(
        model="default",
        messages=[
            {"role": "system", "content": "Answer."},
            {"role": "user", "content": long_prompt(skip + tokens)[skip:]},
        ],
        max_tokens=wanted,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
        **more,
    )
    usage, chunks = None, 0
    async for chunk in stream:
        usage, chunks = chunk.usage or usage, chunks + 1
        if leaves and chunks > wanted // 3:
            await stream.close()
            counts["left"] += 1
            return
    if usage is None or usage.completion_tokens != wanted:
        raise AssertionError(f"{usage} of {wanted} tokens")
    counts["whole"] += 1


def _memory(server: Server) -> dict[str, float]:
    """GiB of the ranks: of the host, and of the GPUs where nvidia-smi tells by process."""
    pids = scheduler_pids(server)
    resident = sum(psutil.Process(pid).memory_info().rss for pid in pids)
    found = {"host": round(resident / 2**30, 3)}
    if (used := device_gib(server)) is not None:
        found["devices"] = round(used, 3)
    return found
