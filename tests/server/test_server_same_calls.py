"""The real server on CPU under a mixed load: every rank makes the same calls in every step."""

from __future__ import annotations

import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ..support.serving.fixture_plugin import write_plugin
from ..support.serving.prompts import NEW_TOKENS, SHORT_PROMPTS, long_prompt
from ..support.serving.server import COMMON_ARGS, Server

REQUESTS, AT_ONCE = 60, 6
LENGTHS = (1, 7, 100, 256, 257, 700)

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

COUNTED = """
import os, sys

def register():
    if "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from moe_plugin.runtime.transports import torch_dist
    sys.path.append(os.environ["COUNTING"])
    from counting import CountingTransport

    made = []

    def counted(group):
        made.append(CountingTransport(inner(group), group))
        return made[-1]

    inner, torch_dist.TorchTransport = torch_dist.TorchTransport, counted

    def step(original, batch, **others):
        # Each scheduler comes here between two steps, also where it has nothing to run.
        made[0].end_step()
        result = original(batch, **others)
        mode = "none" if result is None else result.forward_mode.name
        with open(os.path.join(os.environ["MODES"], str(os.getpid())), "a") as file:
            file.write(mode + "\\n")
        return result

    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.dp_attn.prepare_mlp_sync_batch_raw",
        step, HookType.AROUND)
"""


def _load(server: Server, ranks: int) -> dict[int, list[int]]:
    """Random prompts on random ranks; some leave, some are aborted. Tokens of those that stay."""
    rng = random.Random(0)
    jobs = [
        (index, rng.choice(("stay", "stay", "abort", "leave")), rng.randrange(ranks))
        for index in range(REQUESTS)
    ]
    lengths = [rng.choice(LENGTHS) for _ in jobs]

    def body(index: int, rank: int, tokens: int) -> dict:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        text = SHORT_PROMPTS[index % len(SHORT_PROMPTS)]
        return {"rid": f"r{index}", "sampling_params": sampling, "routed_dp_rank": rank,
                "text": text}  # fmt: skip

    def run(job: tuple[int, str, int]) -> list[int] | None:
        index, fate, rank = job
        if fate == "stay":
            return server.post("/generate", body(index, rank, NEW_TOKENS))["output_ids"]
        gone = body(index, rank, 400) | {"text": long_prompt(lengths[index])}
        with ThreadPoolExecutor(1) as pool:
            if fate == "leave":
                _leave(server, gone)
            else:
                answer = pool.submit(server.post, "/generate", gone)
                time.sleep(0.3)
                server.post("/abort_request", {"rid": gone["rid"]})
                answer.result()
        return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(run, jobs))
    return {job[0]: answer for job, answer in zip(jobs, answers, strict=True) if answer}


def _leave(server: Server, body: dict) -> None:
    """Ask, and go before the answer."""
    text = json.dumps(body | {"stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(
            b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(text) + text
        )
        client.recv(1)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_rank_makes_the_same_calls(
    ranks: int, model: Path, stock: list[dict], tmp_path: Path
) -> None:
    """While others prefill, decode, idle, leave or are aborted; and who stays gets the tokens of
    the stock host."""
    modes = tmp_path / "modes"
    modes.mkdir()
    env = write_plugin(tmp_path / "plugin", "counted", COUNTED, {"sglang.srt.plugins": "register"})
    env |= {"MODES": str(modes), "COUNTING": str(Path(__file__).parents[1] / "support")}
    size = str(ranks)
    over = ("--tp-size", size, "--attn-dp-size", size, "--use-batched-dp-moe", "on")
    with Server((*COMMON_ARGS, *over), model, ranks=ranks, env=env) as server:
        server.wait_ready()
        found = _load(server, ranks)
        server.post("/flush_cache", {})
        found |= _load(server, ranks)
        states = server.states()
    for index, tokens in found.items():
        assert tokens == stock[index % len(SHORT_PROMPTS)]["tokens"], f"request {index}"
    assert len({state["model_forwards"] for state in states}) == 1
    steps = [path.read_text().split() for path in modes.iterdir()]
    assert len(steps) == ranks
    mixtures = {frozenset(step) for step in zip(*steps, strict=False)}
    assert {"EXTEND", "DECODE"} in mixtures
    assert {"EXTEND", "IDLE"} in mixtures
    assert {"DECODE", "IDLE"} in mixtures
