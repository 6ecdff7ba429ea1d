"""The decode instance of a prefill/decode pair: T from decode rows alone."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ...support.random_load import RandomLoad
from ...support.serving.prompts import long_prompt
from ...support.serving.server import Server, free_port
from .answers import ask, check_greedy, prompts
from .machine import (
    GROUPS,
    LOAD_S,
    LONG,
    ON,
    ON_CPU,
    OURS,
    QWEN3,
    RANKS,
    VISIBLE,
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

FEATURE = "prefill/decode disaggregation"
pytestmark = on_two_gpus

DECODES = ("--disaggregation-mode", "decode", "--disaggregation-transfer-backend")
PREFILLS = ("--disaggregation-mode", "prefill", "--disaggregation-transfer-backend")
RUNNING = 128
FAKE = {"bootstrap_host": "2.2.2.2"}
"""Of a request that no prefill instance has seen, as the host marks its own; without it the host's
decode instance dies on the first request."""
LOADS = {"1k/256": (16, 1000, 256), "4k/256": (16, 4000, 256)}
PINNED: tuple[str, ...] = ()
if ON_CPU:
    LOADS = {"300/32": (4, 300, 32)}
    PINNED = ("--disaggregation-decode-retraction-backup", "cpu_tensor")
ALONE = sharing(
    QWEN3,
    *(*GROUPS, *ON, *DECODES, "fake", "--max-running-requests", str(RUNNING), *PINNED),
    kv_tokens=131072,
    decode_graph=0,
    planned={"max_dispatch_tokens_per_rank": RUNNING // RANKS},  # the decode rows of one group
)
PORT = free_port()
PREFILL = sharing(
    QWEN3,
    *(*PREFILLS, "nixl", "--disaggregation-bootstrap-port", str(PORT)),
    *("--use-batched-dp-moe", "off"),
    env={"CUDA_VISIBLE_DEVICES": VISIBLE[0]},
)
DECODE = sharing(
    QWEN3,
    *(*ON, *DECODES, "nixl", "--max-running-requests", "64"),
    env={"CUDA_VISIBLE_DEVICES": VISIBLE[-1]},
    planned={"max_dispatch_tokens_per_rank": 64},
)
REFERENCE = sharing(QWEN3, *OURS)


def test_a_decode_instance_alone(seen: See) -> None:
    """The host's `fake` transfer: keys and values are what lies in memory, steps are real."""
    with start(ALONE) as server:
        ready(server)
        (plan,) = {state["plan"]["max_dispatch_tokens_per_rank"] for state in server.states()}
        with turn():
            speed = {}
            for name, (count, tokens, answer) in LOADS.items():
                asked = [long_prompt(tokens + i)[i:] for i in range(count)]
                speed[name] = timed(server, asked, answer, **FAKE).figures()
            load = RandomLoad(server, RANKS, LONG, new_tokens=64, clients=16, more=FAKE)
            found = load.run(LOAD_S, 10**6)
            rows = largest_rows(server)
    assert not found["problems"], found["problems"][:3]
    seen(
        f"fake transfer, {RUNNING} requests: T = {plan}; served under load, groups idle in turn",
        rows=rows,
        timed=speed,
        load=found,
    )


@gpu_only
@pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason="requires the nixl package for the transfer"
)
def test_a_pair_over_nixl(seen: See) -> None:
    """One GPU prefills without an all-to-all, the other decodes; the first one is restarted."""
    texts = prompts(16, LONG)
    with start(DECODE) as decoder, start(REFERENCE) as reference:
        with start(PREFILL, place=False) as prefiller:
            ready(prefiller, decoder, reference)
            with turn():
                own = ask(reference, texts, 24)
                first = _pair(prefiller, decoder, texts)
                text = check_greedy(reference, own, first)
        with start(PREFILL, place=False) as prefiller:
            ready(prefiller)
            with turn():
                second = _pair(prefiller, decoder, texts)
                check_greedy(reference, own, second)
                rows = largest_rows(decoder)
    seen(f"a pair of 1 + 1 GPUs over nixl, the prefill instance restarted: {text}", rows=rows)


_rooms: Iterator[int] = itertools.count(1)


def _pair(prefiller: Server, decoder: Server, texts: list[str]) -> list[dict[str, Any]]:
    """What a router does: the same request to both."""

    def one(text: str) -> dict[str, Any]:
        meet = {
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": PORT,
            "bootstrap_room": next(_rooms),
        }
        sampling = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
        asked = {"text": text, "sampling_params": sampling, "return_logprob": True, **meet}
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(prefiller.post, "/generate", asked)
            answer = decoder.generate(text, 24, **meet)
            sent.result()
        return answer | {"asked": text}

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, texts))
