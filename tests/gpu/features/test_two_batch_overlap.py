"""Two-batch overlap: each half of a batch goes through the experts while the other attends."""

from __future__ import annotations

from pathlib import Path

from ...support.random_load import RandomLoad
from .answers import ask, check_greedy, prompts
from .machine import (
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

FEATURE = "two-batch overlap"
pytestmark = [*on_two_gpus, gpu_only]

LOADS = {"64 short": (64, 60), "8 long": (8, LONG)}


def test_both_halves_within_t_and_the_same_answers(qwen3: Path, seen: See) -> None:
    """Beside the same server without; faster or slower, by load."""
    texts = prompts(16, LONG)
    with start(qwen3, *OURS) as plain, start(qwen3, *OURS, "--enable-two-batch-overlap") as server:
        ready(plain, server)
        with turn():
            own, answers = ask(plain, texts, 24), ask(server, texts, 24)
            text = check_greedy(plain, own, answers)
            found = RandomLoad(server, RANKS, longest=LONG, new_tokens=64, clients=16).run(
                LOAD_S, 10**6
            )
            speed = {}
            for name, (count, tokens) in LOADS.items():
                asked = prompts(count, tokens)
                for which, one in (("without", plain), ("with", server)) * 2:  # the second counts
                    speed[f"{name}, {which}"] = timed(one, asked, 48).figures()
            rows = largest_rows(server)
    assert not found["problems"]
    ratios = {
        name: round(speed[f"{name}, with"]["tokens_s"] / speed[f"{name}, without"]["tokens_s"], 2)
        for name in LOADS
    }
    said = ", ".join(f"{ratio} at {name}" for name, ratio in ratios.items())
    seen(f"{text}; tokens/s over those without: {said}", rows=rows, load=found, timed=speed)
