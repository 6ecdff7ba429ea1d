"""What the servers answer: mixed prompts, the same tokens' log-probabilities, planned memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from serving.prompts import long_prompt
from serving.server import Server

LENGTHS = (1, 7, 63, 256, 257, 1000, 4000)
PLANNED = (
    "max_dispatch_tokens_per_rank", "rdma_buffer_bytes", "rdma_device_bytes", "workspace_bytes",
    "reserved_bytes", "nvshmem_qp_depth",
)  # fmt: skip
HINT = """
import json, sys, deep_ep
T, H, R, E = json.loads(sys.argv[1])
print(deep_ep.Buffer.get_low_latency_rdma_size_hint(T, H, R, E))
"""


def mixed(server: Server, longest: int = 4000) -> dict[str, Any]:
    """First requests of a server's life: one alone twice, then 64 of mixed lengths at once."""
    first, second = (_timed(server, seed) for seed in (1, 2))
    rng = random.Random(0)
    lengths = [min(longest, rng.choice(LENGTHS)) for _ in range(64)]
    began = time.perf_counter()
    answers = server.generate_many([long_prompt(n) for n in lengths], 32, concurrency=64)
    return {
        "requests": len(answers),
        "lost": sum(len(a["tokens"]) != 32 for a in answers),
        "seconds": round(time.perf_counter() - began, 2),
        "first_request_s": first,
        "second_request_s": second,
    }


def _timed(server: Server, seed: int) -> float:
    began = time.perf_counter()
    server.generate(long_prompt(400)[seed * 20 :][:100], 32)
    return round(time.perf_counter() - began, 3)


def forced(server: Server, longest: int = 1500) -> list[float]:
    """Teacher-forced log-probabilities of four prompts' tokens."""
    values: list[float] = []
    for tokens, skip in ((300, 0), (700, 13), (longest, 29), (260, 5)):
        answer = server.post(
            "/generate",
            {
                "text": long_prompt(tokens)[skip:],
                "sampling_params": {"max_new_tokens": 1},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        values += [pair[0] for pair in answer["meta_info"]["input_token_logprobs"][1:]]
    return values


def distances(values: Mapping[str, list[float]]) -> dict[str, float]:
    """Mean absolute difference between each two servers' log-probabilities."""
    return {
        f"{one} to {other}": round(
            sum(abs(x - y) for x, y in zip(values[one], values[other], strict=True))
            / len(values[one]),
            6,
        )
        for one, other in combinations(values, 2)
    }


def memory(server: Server, *, alone: bool) -> dict[str, Any] | None:
    """Planned bytes beside measured ones of every scheduler; None for a stock server.

    Args:
        server: it runs.
        alone: nothing else was starting meanwhile: free memory is the device's, so that only then
            its drop across the buffer's creation is this server's.
    """
    states = server.states()
    if not states or not states[0].get("plan"):
        return None
    plan = states[0]["plan"]
    row = {key: plan.get(key) for key in PLANNED}
    row |= {
        "alone": alone,
        "buffer_device_bytes": [
            taken for state in states if (taken := state.get("buffer_device_bytes")) is not None
        ],
        "max_rows": [state.get("max_rows") for state in states],
    }
    if plan.get("transport") == "deepep":
        row["deepep_hint_bytes"] = _hint(plan)
    return row


def _hint(plan: Mapping[str, Any]) -> int | None:
    """DeepEP's own answer; in a process of its own, since importing it takes the GPU."""
    asked = (
        plan["max_dispatch_tokens_per_rank"], plan["hidden_size"], plan["ep_size"],
        plan["num_experts"],
    )  # fmt: skip
    command = [sys.executable, "-P", "-c", HINT, json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return int(done.stdout.split()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        print(f"DeepEP's hint: {error!r}", file=sys.stderr)
        return None
