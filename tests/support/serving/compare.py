"""Compare two servers' greedy answers to the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Both servers compute in fp32; the routes differ in the order of a few hundred additions per
# value. Measured over the demo's and the tests' prompts: at most 6e-6.
MAX_LOGPROB_DISTANCE = 1e-4


def logprob_distance(ours: Sequence[dict[str, Any]], stock: Sequence[dict[str, Any]]) -> float:
    """Largest distance between log-probabilities of corresponding output tokens."""
    return max(
        abs(a - b)
        for one, other in zip(ours, stock, strict=True)
        for a, b in zip(one["logprobs"], other["logprobs"], strict=True)
    )


def different_tokens(ours: Sequence[dict[str, Any]], stock: Sequence[dict[str, Any]]) -> list[int]:
    """Indices of the prompts whose output tokens differ."""
    return [
        i for i, (a, b) in enumerate(zip(ours, stock, strict=True)) if a["tokens"] != b["tokens"]
    ]


def uncounted_layers(states: Sequence[dict[str, Any]], layers: int) -> list[str]:
    """What is wrong with "layers x forwards" per rank; empty when every layer ran in our runner."""
    wrong = []
    for state in states:
        expected = {str(layer): state["model_forwards"] for layer in range(layers)}
        if state["layer_forwards"] != expected:
            wrong.append(
                f"rank {state['tp_rank']}: {state['layer_forwards']}, host counted "
                f"{state['model_forwards']} forwards of {layers} layers"
            )
    return wrong


def check_equal(ours: Sequence[dict[str, Any]], stock: Sequence[dict[str, Any]]) -> None:
    """Assert equal tokens, and log-probabilities within the bound."""
    assert different_tokens(ours, stock) == []
    assert logprob_distance(ours, stock) <= MAX_LOGPROB_DISTANCE
