"""Prompts shared by the demo and the end-to-end tests."""

from __future__ import annotations

NEW_TOKENS = 16  # of every answer that is compared

# One token per byte: at least 32 tokens each.
SHORT_PROMPTS = (
    "The experts of a mixture are small; the traffic between them is not.",
    "A buffer that is sized once must never be asked for one row more.",
    "Seven ranks, eight experts each, and a queue that never empties.",
    "Prefill arrives in long lines, decode in single steps, both must fit.",
    "What is planned before anything is loaded cannot surprise anybody later.",
    "0123456789 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "Dispatch, experts, combine: once per layer, without a chunk loop.",
    "A count per expert says which rows live; the others may hold anything.",
)


def long_prompt(tokens: int) -> str:
    """A prompt of exactly ``tokens`` byte tokens, without a short period."""
    words = " ".join(f"{index * 7919 % 10007}" for index in range(tokens))
    return words[:tokens]


LONG_PROMPT = long_prompt(1500)  # several times the default budget
PROMPTS = (*SHORT_PROMPTS, LONG_PROMPT)
