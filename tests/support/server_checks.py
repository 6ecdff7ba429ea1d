"""What a server with several ranks must do with any load; the same on CPUs and on GPUs."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from moe_plugin.backends.deepep import NVSHMEM_GRANULE

from .serving.prompts import SHORT_PROMPTS, long_prompt
from .serving.server import Server


def check_mixed_prompts(
    server: Server, requests: int, lengths: Sequence[int], new_tokens: int
) -> None:
    """Concurrent prompts of mixed lengths: every one is answered in full."""
    rng = random.Random(0)
    prompts = [long_prompt(rng.choice(lengths)) for _ in range(requests)]
    answers = server.generate_many(prompts, new_tokens, concurrency=requests)
    assert [len(answer["tokens"]) for answer in answers] == [new_tokens] * requests


def answers_alone(server: Server) -> list[tuple[Any, Any]]:
    """Tokens and log-probabilities of requests without company, their prefix cached: same bits
    whenever the weights are the same."""
    found = []
    server.post("/flush_cache?timeout=10", {})  # no prefix that an earlier request has computed
    for text in SHORT_PROMPTS[:4]:
        for _ in range(2):
            answer = server.generate(text, 24, routed_dp_rank=0)
        found.append((answer["tokens"], answer["logprobs"]))
    return found


def check_idle_ranks(server: Server, new_tokens: int) -> None:
    """One request keeps one rank busy; the others take part in every step, with no rows."""
    before = _forwards(server)
    answer = server.generate(SHORT_PROMPTS[0], new_tokens)
    after = _forwards(server)
    assert len(answer["tokens"]) == new_tokens
    steps = {after[rank] - before[rank] for rank in after}
    assert len(steps) == 1, f"ranks did not step together: {steps}"
    assert steps.pop() >= new_tokens


def check_unequal_load(server: Server, ranks: int, longest: int, new_tokens: int) -> None:
    """Long prompts on one rank, short ones on the others: the host deals them out in turn."""
    prompts = [
        long_prompt(longest) if i % ranks == 0 else SHORT_PROMPTS[i % len(SHORT_PROMPTS)]
        for i in range(3 * ranks)
    ]
    answers = server.generate_many(prompts, new_tokens, concurrency=len(prompts))
    assert [len(answer["tokens"]) for answer in answers] == [new_tokens] * len(prompts)


def check_within_plan(server: Server, ranks: int, layers: int) -> None:
    """Every rank ran every layer in our runner, within T; its buffer is no larger than planned."""
    states = server.states()
    assert sorted(state["tp_rank"] for state in states) == list(range(ranks))
    for state in states:
        plan, taken = state["plan"], state["buffer_device_bytes"]
        assert set(state["layer_forwards"]) == {str(layer) for layer in range(layers)}
        assert max(state["max_rows_any_rank"].values()) <= plan["max_dispatch_tokens_per_rank"]
        if plan["rdma_buffer_bytes"]:
            planned = plan["rdma_device_bytes"]
            assert taken <= planned <= taken + NVSHMEM_GRANULE, f"{taken} taken, {planned} planned"
        if (held := state["workspace_device_bytes"]) is not None:
            planned = plan["workspace_bytes"]
            assert held <= planned, f"{held} taken, {planned} planned"


def check_steps(server: Server, replayed: bool) -> None:
    """Steps of every rank are the host's own count of forwards; those that decode replayed graphs,
    or none did."""
    for state in server.states():
        steps = state["steps"]
        assert sum(sum(found.values()) for found in steps.values()) == state["model_forwards"]
        assert bool(steps["decode"].get("replayed")) == replayed, steps


def check_same_bits(server: Server, ranks: int, longest: int, new_tokens: int) -> None:
    """A request gets the same tokens and log-probabilities, to the last bit, while other groups
    prefill as it gets alone; its own group has nothing else to do."""
    answer = partial(server.generate, SHORT_PROMPTS[0], new_tokens, routed_dp_rank=0)
    answer()  # its prefix is cached from here on
    alone = [answer() for _ in range(2)]
    over, prefilled = threading.Event(), []

    def prefill(rank: int) -> None:
        rng = random.Random(rank)
        while not over.is_set():
            start = rng.randrange(1000)
            text = long_prompt(start + rng.randint(1, longest))[start:]
            server.generate(text, 1, routed_dp_rank=rank)
            prefilled.append(rank)

    with ThreadPoolExecutor(2 * ranks) as pool:
        others = [pool.submit(prefill, rank) for rank in range(1, ranks) for _ in range(2)]
        try:
            among = [answer() for _ in range(8)]
        finally:
            over.set()
        for other in others:
            other.result()
    assert set(prefilled) == set(range(1, ranks))
    for field in ("tokens", "logprobs"):
        expected = alone[0][field]
        assert alone[1][field] == expected, f"{field}, twice alone"
        assert [one[field] for one in among] == [expected] * len(among), f"{field} under load"


def forced_logprobs(server: Server, prompts: Sequence[str]) -> list[float]:
    """Log-probabilities of the prompts' own tokens: no choice of the server enters."""
    values = []
    for prompt in prompts:
        answer = server.post(
            "/generate",
            {
                "text": prompt,
                "sampling_params": {"max_new_tokens": 1},
                "return_logprob": True,
                "logprob_start_len": 0,
            },
        )
        values += [pair[0] for pair in answer["meta_info"]["input_token_logprobs"][1:]]
    return values


def mean_distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Of corresponding values."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def _forwards(server: Server) -> dict[int, int]:
    return {state["tp_rank"]: state["model_forwards"] for state in server.states()}
