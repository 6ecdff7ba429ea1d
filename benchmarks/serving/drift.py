"""Stage `drift`: whether the answers of a server get worse under load.

Prompts are asked alone, and then among many others that arrive and end at their own times, so that
groups prefill while others decode. Rounding differs between the two, and where two tokens are
nearly as likely another one is chosen. What tells that from an error is the regret: how much less
likely the chosen tokens are than the likeliest ones, when one server, idle, is given the whole
answer to read. Graphs that compute something else under load have more of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from math import sqrt
from statistics import mean, stdev
from typing import Any

from common import Bench
from servers import Detached, load_state
from serving.server import Server
from streams import TOKEN_IDS

COMPARED = 16  # tokens of every answer
NEW_TOKENS = (16, 96)  # of an answer under load: requests end at different times
PROMPT_TOKENS = (16, 64)
READABLE = 259  # ids from here on the host does not take as input
AT_ONCE = 64
READERS = 16

Answer = tuple[int, list[int]]  # a prompt's number, and what came


def stage_drift(bench: Bench) -> None:
    """Every server that is up: its answers alone and under load, read by the first one."""
    few, many = (4, 16) if bench.cpu else (64, 512)
    servers = load_state(bench.options.work)
    if not servers:
        return
    reader = servers[0]
    with ThreadPoolExecutor(len(servers)) as pool:
        alone = list(pool.map(lambda server: answers_alone(server, few), servers))
    outcomes = bench.report.setdefault("drift", {})
    for server, own in zip(servers, alone, strict=True):
        logged = server.log_bytes()
        loaded = answers_under_load(server, many)
        replayed = server.prefills(logged)
        reader.idle()
        outcomes[server.record.variant] = {
            "alone": {"regret": regret(reader, own), **kept(own, alone[0])},
            "under load": {"regret": regret(reader, loaded), **kept(loaded, own)},
            "reader": reader.record.variant,
            "prefill batches logged": len(replayed),
            "of them replayed": sum(replayed),
        }
        print(server.record.variant, outcomes[server.record.variant], flush=True)
        bench.save()


def answers_alone(server: Server, prompts: int) -> list[Answer]:
    """One prompt at a time."""
    return [(index, _ask(server, prompt(index), COMPARED)) for index in range(prompts)]


def answers_under_load(server: Detached, prompts: int) -> list[Answer]:
    """Many at once, in no order, with no cached prefix.

    Raises:
        RuntimeError: an answer ended short.
    """
    server.idle()
    rng = random.Random(0)
    order = rng.sample(range(prompts), prompts)
    lengths = [rng.randint(*NEW_TOKENS) for _ in order]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        got = pool.map(lambda index, n: _ask(server, prompt(index), n), order, lengths)
        return list(zip(order, got, strict=True))


def kept(answers: Sequence[Answer], alone: Sequence[Answer]) -> dict[str, Any]:
    """Shares of first tokens, and of tokens before the first that differs, that are those given
    alone, with the standard error of the mean over the answers that were."""
    own = dict(alone)
    equal = [equal_tokens(own[index], tokens) for index, tokens in answers if index in own]
    return {
        "answers": len(answers),
        "first token kept": round(mean(float(count > 0) for count in equal), 4),
        "tokens kept": _estimate([count / COMPARED for count in equal]),
    }


def equal_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Of the compared tokens, those before the first that differs."""
    pairs = zip(one[:COMPARED], other[:COMPARED], strict=True)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), COMPARED)


def regret(reader: Server, answers: Sequence[Answer]) -> dict[str, float]:
    """Log-probability that a chosen token lacks to the likeliest one: the mean of each answer's."""

    def lacking(answer: Answer) -> float | None:
        index = answer[0]
        tokens = list(takewhile(lambda token: token < READABLE, answer[1]))
        if not tokens:
            return None
        meta = reader.post(
            "/generate",
            {
                "input_ids": [*prompt(index), *tokens],
                "sampling_params": {"max_new_tokens": 1},
                "return_logprob": True,
                "logprob_start_len": len(prompt(index)) - 1,  # which itself has none
                "top_logprobs_num": 1,
            },
        )["meta_info"]
        chosen = meta["input_token_logprobs"][-len(tokens) :]
        best = meta["input_top_logprobs"][-len(tokens) :]
        assert [pair[1] for pair in chosen] == tokens
        return mean(top[0][0] - pair[0] for top, pair in zip(best, chosen, strict=True))

    with ThreadPoolExecutor(READERS) as pool:
        return _estimate([value for value in pool.map(lacking, answers) if value is not None])


def prompt(index: int) -> list[int]:
    """Token ids, by number."""
    rng = random.Random(f"drift/{index}")
    return rng.choices(TOKEN_IDS, k=rng.randint(*PROMPT_TOKENS))


def _estimate(values: Sequence[float]) -> dict[str, float]:
    error = stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": round(mean(values), 5), "standard error": round(error, 5)}


def _ask(server: Server, ids: Sequence[int], count: int) -> list[int]:
    # Log-probabilities would keep a request out of replayed prefills.
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": count, "ignore_eos": True}
    answer = server.post("/generate", {"input_ids": list(ids), "sampling_params": sampling})
    tokens: list[int] = answer["output_ids"]
    if len(tokens) != count:
        raise RuntimeError(f"{len(tokens)} of {count} tokens")
    return tokens
