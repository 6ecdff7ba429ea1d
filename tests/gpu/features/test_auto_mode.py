"""Mode `auto`, one instance: prompts go through normal dispatch in one piece, decode rows in T."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...support.random_load import RandomLoad
from ...support.serving.prompts import long_prompt
from ...support.serving.server import ServerDied
from .answers import ask, check_greedy, prompts
from .machine import (
    GROUPS,
    LOAD_S,
    LONG,
    OURS,
    RANKS,
    gpu_only,
    largest_rows,
    on_two_gpus,
    ready,
    start,
    turn,
)
from .records import See
from .timed import timed

FEATURE = "mode auto"
pytestmark = [*on_two_gpus, gpu_only]

# Under `on` the mode would be low latency: the host's default is `auto`, so nobody has typed it.
AUTO = ("--moe-a2a-backend", "deepep", "--use-batched-dp-moe", "auto")
RUNNER = {"qwen3": ("--moe-runner-backend", "deep_gemm"), "deepseek": ()}
"""Of normal dispatch: bf16 has no other one, and FP8 has it by itself."""
DENSE = ("--fp8-gemm-backend", "triton")  # DeepGEMM's kernels for dense layers compile for minutes
DEEP_GEMM = {"SGLANG_ENABLE_JIT_DEEPGEMM": "1", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}


@pytest.mark.parametrize("shape", ["qwen3", "deepseek"])
def test_prompts_in_one_piece(shape: str, seen: See, request: pytest.FixtureRequest) -> None:
    """bf16 and FP8: 4,000-token prompts under load, beside low latency."""
    model: Path = request.getfixturevalue(shape)
    texts = prompts(16, LONG)
    with (
        start(model, *GROUPS, *AUTO, *RUNNER[shape], *DENSE, env=DEEP_GEMM) as server,
        start(model, *OURS) as low_latency,
    ):
        ready(server, low_latency)
        (chunk,) = {state["plan"]["chunked_prefill_size"] or 0 for state in server.states()}
        assert all(state["plan"]["own_decode"] for state in server.states())
        with turn():
            own, answers = ask(low_latency, texts, 24), ask(server, texts, 24)
            text = check_greedy(low_latency, own, answers)
            long = [long_prompt(LONG + i)[i:] for i in range(16)]
            speed = {
                name: timed(one, long, 48).figures()
                for name, one in (("auto", server), ("low latency", low_latency)) * 2
            }
            found = RandomLoad(server, RANKS, longest=LONG, new_tokens=64, clients=16).run(
                LOAD_S, 10**6
            )
            rows = largest_rows(server)
            counted = [state["layer_forwards"] for state in server.states()]
    assert not found["problems"]
    assert all(counted), "our experts ran on no rank"
    seen(
        f"{shape}, SGLang's experts in prefill and ours in decode, "
        f"{chunk or 'no bound of ours for'} tokens per chunk: {text}",
        rows=rows,
        timed=speed,
        load=found,
    )


def test_bf16_without_deep_gemm_is_refused(qwen3: Path, seen: See) -> None:
    """Before anything loads, with the runner that would do."""
    with start(qwen3, *GROUPS, *AUTO) as server, pytest.raises(ServerDied):
        server.wait_ready(120)
    log = server.log()
    assert "--moe-runner-backend deep_gemm" in log
    assert "Load weight begin" not in log
    seen("bf16 with the runner left out: refused before weights load, deep_gemm is offered")
