"""The real server on CPU under a mixed load: every rank makes the same calls in every step."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ..support.random_load import RandomLoad
from ..support.serving.checkpoint import Shape, write_checkpoint
from ..support.serving.fixture_plugin import write_plugin
from ..support.serving.prompts import NEW_TOKENS, SHORT_PROMPTS
from ..support.serving.server import COMMON_ARGS, Server

LOAD_S = 45.0

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


def _tokens(server: Server, index: int, rank: int) -> list[int]:
    sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    text = SHORT_PROMPTS[index % len(SHORT_PROMPTS)]
    body = {"text": text, "sampling_params": sampling, "routed_dp_rank": rank}
    return server.post("/generate", body)["output_ids"]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_rank_makes_the_same_calls(ranks: int, tmp_path: Path) -> None:
    """While others prefill, decode, idle, leave or are aborted; and a request that stays gets the
    tokens that it gets alone."""
    # On a CPU the host wants the heads to divide over all ranks, whatever attention DP is.
    model = write_checkpoint(tmp_path / "model", Shape(num_key_value_heads=4))
    modes = tmp_path / "modes"
    modes.mkdir()
    env = write_plugin(tmp_path / "plugin", "counted", COUNTED, {"sglang.srt.plugins": "register"})
    env |= {"MODES": str(modes), "COUNTING": str(Path(__file__).parents[1] / "support")}
    size = str(ranks)
    over = ("--tp-size", size, "--attn-dp-size", size, "--use-batched-dp-moe", "on")
    with Server((*COMMON_ARGS, *over), model, ranks=ranks, env=env) as server:
        server.wait_ready()
        alone = [_tokens(server, index, 0) for index in range(len(SHORT_PROMPTS))]
        load = RandomLoad(server, ranks, longest=700, new_tokens=60, clients=3)
        answers: list[list[int]] = []
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(load.run, LOAD_S, 100_000)
            while not running.done():
                answers.append(_tokens(server, len(answers), len(answers) % ranks))
        found = running.result()
        states = server.states()
    assert not found["problems"]
    assert {"stay", "leave", "abort", "flush"} <= set(found["requests"]), found
    for index, tokens in enumerate(answers):
        assert tokens == alone[index % len(SHORT_PROMPTS)], f"request {index}"
    assert len({state["model_forwards"] for state in states}) == 1
    steps = [path.read_text().split() for path in modes.iterdir()]
    assert len(steps) == ranks
    mixtures = {frozenset(step) for step in zip(*steps, strict=False)}
    for pair in ({"EXTEND", "DECODE"}, {"EXTEND", "IDLE"}, {"DECODE", "IDLE"}):
        assert any(pair <= step for step in mixtures), (pair, mixtures)
