"""Decoding requests that ride along with prefill chunks, in the real server on two CPU ranks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ..support.hosts import program
from ..support.serving.fixture_plugin import write_plugin
from ..support.serving.prompts import SHORT_PROMPTS, long_prompt
from ..support.serving.server import COMMON_ARGS, TWO_EP_RANKS, Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

PROMPTS = [*SHORT_PROMPTS, *(long_prompt(tokens) for tokens in (300, 520, 700, 1100))]
NEW_TOKENS = 24
LEAST_STEPS = 10


def test_answers_are_those_of_requests_that_are_alone(model: Path, tmp_path: Path) -> None:
    """No log-probabilities are asked for: the host does not let such requests ride along."""
    folder = tmp_path / "steps"
    folder.mkdir()
    plugin = program("plugin_mixed_steps")
    env = write_plugin(tmp_path / "plugin", "mixed", plugin, {"sglang.srt.plugins": "register"})
    env |= {"PROBE_DIR": str(folder)}
    args = (*COMMON_ARGS, *TWO_EP_RANKS, "--use-batched-dp-moe", "on", "--enable-mixed-chunk")
    with Server(args, model, ranks=2, env=env) as server:
        server.wait_ready()

        def text(prompt: str) -> str:
            sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
            answer = server.post("/generate", {"text": prompt, "sampling_params": sampling})
            return str(answer["text"])

        alone = [text(prompt) for prompt in PROMPTS]
        assert not list(folder.iterdir())
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            together = list(pool.map(text, PROMPTS + PROMPTS[::-1]))
        (plan,) = {state["plan"]["mixed_chunk"] for state in server.states()}
    assert plan
    assert sum(len(path.read_text()) for path in folder.iterdir()) >= LEAST_STEPS
    assert together == [*alone, *alone[::-1]]
