"""Whether a server's greedy answers are what another one would have said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ...support.serving.checkpoint import byte_tokenizer
from ...support.serving.prompts import SHORT_PROMPTS, long_prompt
from ...support.serving.server import Server

FACTOR = 2.0
"""An answer may be this many times as far from a forced prefill as the reference's own ones are:
both round in bf16 or FP8, in another order."""
MOST_NOISE = 1.0
"""Mean distance of a server's answers from its own prefill. Rounding may choose another expert;
unrelated tokens are 3 apart."""

Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Forced:
    """Answers beside the log-probabilities that a server gives to their tokens when all are there.

    Attributes:
        mean: mean distance of the two log-probabilities of a token.
        most: the largest one.
        gap: how much likelier than an answer's token the likeliest one is, at most.
    """

    mean: float
    most: float
    gap: float


def prompts(count: int, longest: int) -> list[str]:
    """Short ones, and every fourth of up to ``longest`` tokens; no two are equal."""
    return [
        long_prompt(longest + 3 * index)[3 * index :][: max(longest // 2, longest - 17 * index)]
        if index % 4 == 3
        else f"{index} {SHORT_PROMPTS[index % len(SHORT_PROMPTS)]}"
        for index in range(count)
    ]


def ask(
    server: Server, texts: Sequence[str], new_tokens: int, concurrency: int = 16
) -> list[Answer]:
    """All answers, with the text they answer."""
    answers = server.generate_many(texts, new_tokens, concurrency)
    assert [len(answer["tokens"]) for answer in answers] == [new_tokens] * len(texts)
    return [answer | {"asked": text} for answer, text in zip(answers, texts, strict=True)]


def forced(server: Server, answers: Sequence[Answer]) -> Forced:
    """What ``server`` thinks of answers, its own or another's, in one prefill each."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda answer: _forced(server, answer), answers))
    distances = [one for each, _ in found for one in each]
    gaps = [one for _, each in found for one in each]
    return Forced(sum(distances) / len(distances), max(distances), max(gaps))


def _forced(server: Server, answer: Answer) -> tuple[list[float], list[float]]:
    asked = byte_tokenizer().encode(answer["asked"]).ids
    body = {
        "input_ids": asked + answer["tokens"],
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 1,
    }
    meta: Mapping[str, Any] = server.post("/generate", body)["meta_info"]
    own = [pair[0] for pair in meta["input_token_logprobs"][len(asked) :]]
    best = [top[0][0] for top in meta["input_top_logprobs"][len(asked) :]]
    assert len(own) == len(answer["tokens"])
    distances = [abs(a - b) for a, b in zip(own, answer["logprobs"], strict=True)]
    return distances, [top - token for top, token in zip(best, own, strict=True)]


def check_greedy(reference: Server, own: Sequence[Answer], others: Sequence[Answer]) -> str:
    """Another server's answers are greedy for ``reference``, as far as its own ones are.

    Tokens alone would not do: where two are about equally likely, rounding decides, and all that
    follows differs.

    Returns:
        What was seen, for people.
    """
    ours, theirs = forced(reference, own), forced(reference, others)
    equal = sum(a["tokens"] == b["tokens"] for a, b in zip(own, others, strict=True))
    text = (
        f"{equal} of {len(own)} answers equal to the last token; log-probabilities "
        f"{theirs.mean:.1e} from those of a prefill, the reference's own {ours.mean:.1e}"
    )
    print(text, ours, theirs, flush=True)
    assert ours.mean <= MOST_NOISE, text
    floor = 1e-5  # float32 on a CPU
    assert theirs.mean <= FACTOR * max(ours.mean, floor), text
    assert theirs.gap <= FACTOR * max(2 * ours.most, floor), text
    return text
