"""Long contexts: a prompt of 32k tokens takes many steps, and decodes in graphs."""

from __future__ import annotations

import os
import re

import pytest

from ...support.serving.prompts import long_prompt
from ..launches import DISABLED, Launch
from .machine import (
    GROUPS,
    ON,
    QWEN3,
    gpu_only,
    largest_rows,
    on_two_gpus,
    ready,
    sharing,
    start,
    turn,
)
from .records import See
from .timed import timed

FEATURE = "long contexts"
pytestmark = [*on_two_gpus, gpu_only]

MOST_EAGER = 0.05
LONGER = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
_STEP = re.compile(r"(Prefill|Decode) batch.* graph: (True|False)")
T = ("--batched-dp-moe-max-tokens", os.environ.get("FEATURES_LONG_T", "1024"))


def _servers(tokens: int, requests: int) -> tuple[Launch, Launch]:
    """Ours, and the stock host without an all-to-all."""
    context = ("--context-length", str(tokens + 4096))
    kv = (tokens + 2048) * requests * 3 // 5  # half of them in each group, with room
    return (
        sharing(QWEN3, *GROUPS, *ON, *context, *T, kv_tokens=kv, env=LONGER),
        sharing(QWEN3, *GROUPS, *context, kv_tokens=kv, env=DISABLED | LONGER),
    )


REQUESTS = {32_000: 8, 128_000: 2}
SERVERS = {tokens: _servers(tokens, requests) for tokens, requests in REQUESTS.items()}
"""By tokens of a prompt."""


@pytest.mark.parametrize("tokens", [32_000, pytest.param(128_000, marks=pytest.mark.slow)])
def test_no_eager_cliff(tokens: int, seen: See) -> None:
    """Prefill and decode steps replay graphs; beside the stock host without an all-to-all."""
    requests = REQUESTS[tokens]
    texts = [long_prompt(tokens + i)[i:] for i in range(requests)]
    ours, plain = SERVERS[tokens]
    with start(ours) as server, start(plain) as stock:
        ready(server, stock)
        with turn():
            server.lines.clear()
            speed = {"ours": timed(server, texts, 64).figures()}
            steps = _STEP.findall(server.log())
            speed["stock"] = timed(stock, texts, 64).figures()
            rows = largest_rows(server)
    eager = [kind for kind, graph in steps if graph == "False"]
    assert steps
    assert len(eager) <= MOST_EAGER * len(steps), f"{len(eager)} of {len(steps)} steps were eager"
    ratios = {name: speed["ours"][name] / speed["stock"][name] for name in speed["ours"]}
    seen(
        f"{requests} prompts of {tokens} tokens: {len(eager)} of {len(steps)} logged steps eager; "
        f"of the stock host's without an all-to-all: tokens/s {ratios['tokens_s']:.2f}, "
        f"inter-token latency {ratios['itl_ms']:.2f}, longest wait {ratios['longest_ms']:.2f}",
        rows=rows,
        timed=speed,
    )
