"""Mode `auto`, one instance: prompts go through normal dispatch in one piece, decode rows in T."""

from __future__ import annotations

import pytest

from ...support.random_load import RandomLoad
from ...support.serving.prompts import long_prompt
from ...support.serving.server import Server, ServerDied
from .answers import ask, check_greedy, prompts
from .machine import (
    DEEPSEEK,
    GROUPS,
    LOAD_S,
    LONG,
    OURS,
    QWEN3,
    RANKS,
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

FEATURE = "mode auto"
pytestmark = [*on_two_gpus, gpu_only]

# Under `on` the mode would be low latency: the host's default is `auto`, so nobody has typed it.
AUTO = ("--moe-a2a-backend", "deepep", "--use-batched-dp-moe", "auto")
REPEATS = 4
DEEP_GEMM_RUNNER = ("--moe-runner-backend", "deep_gemm")
"""Of normal dispatch: bf16 has no other one, and FP8 has it by itself."""
DENSE = ("--fp8-gemm-backend", "triton")  # DeepGEMM's kernels for dense layers compile for minutes
DEEP_GEMM = {"SGLANG_ENABLE_JIT_DEEPGEMM": "1", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"}
OWN_DECODE = {"own_decode": True, "runner": "host", "chunked_prefill_size": 0}
SERVERS = {
    name: (
        sharing(model, *GROUPS, *AUTO, *runner, *DENSE, env=DEEP_GEMM, planned=OWN_DECODE),
        sharing(model, *OURS),
    )
    for name, model, runner in (("qwen3", QWEN3, DEEP_GEMM_RUNNER), ("deepseek", DEEPSEEK, ()))
}
"""In mode auto and in low latency, by model."""
NO_RUNNER = sharing(QWEN3, *GROUPS, *AUTO, env=DEEP_GEMM, refused="--moe-runner-backend deep_gemm")


@pytest.mark.parametrize("shape", SERVERS)
def test_prompts_in_one_piece(shape: str, seen: See) -> None:
    """bf16 and FP8: 4,000-token prompts under load, beside low latency."""
    texts = prompts(16, LONG)
    auto, other = SERVERS[shape]
    with start(auto) as server, start(other) as low_latency:
        ready(server, low_latency)
        (chunk,) = {state["plan"]["chunked_prefill_size"] or 0 for state in server.states()}
        with turn():
            own, answers = ask(low_latency, texts, 24), ask(server, texts, 24)
            text = check_greedy(low_latency, own, answers)
            long = [long_prompt(LONG + i)[i:] for i in range(16)]
            both = {"auto": server, "low latency": low_latency}
            speed = {name: _best(one, long) for name, one in both.items()}
            found = RandomLoad(server, RANKS, longest=LONG, new_tokens=64, clients=16).run(
                LOAD_S, 10**6
            )
            rows = largest_rows(server)
            counted = [state["layer_forwards"] for state in server.states()]
    assert not found["problems"]
    assert all(counted), "our experts ran on no rank"
    seen(
        f"{shape}, SGLang's experts in prefill and ours in decode, "
        f"{chunk or 'no bound of ours for'} tokens per chunk: {text}; tokens/s "
        f"{speed['auto']['tokens_s'] / speed['low latency']['tokens_s']:.2f} of low latency's",
        rows=rows,
        timed=speed,
        load=found,
    )


def _best(server: Server, texts: list[str]) -> dict[str, float]:
    """Of several times, none with a cached prefix: DeepGEMM compiles what it meets first."""
    found = []
    for _ in range(REPEATS):
        server.post("/flush_cache?timeout=10", {})
        found.append(timed(server, texts, 48).figures())
    return max(found, key=lambda figures: figures["tokens_s"])


def test_bf16_without_deep_gemm_is_refused(seen: See) -> None:
    """Before anything loads, with the runner that would do."""
    with start(NO_RUNNER) as server, pytest.raises(ServerDied):
        server.wait_ready()
    log = server.log()
    assert NO_RUNNER.refused in log
    assert "Load weight begin" not in log
    seen("bf16 with the runner left out: refused before weights load, deep_gemm is offered")
