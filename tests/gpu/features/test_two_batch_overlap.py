"""Two-batch overlap: each half of a batch goes through the experts while the other attends."""

from __future__ import annotations

from ...support.random_load import RandomLoad
from .answers import ask, check_greedy, prompts
from .machine import (
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

FEATURE = "two-batch overlap"
pytestmark = [*on_two_gpus, gpu_only]

PLAIN = sharing(QWEN3, *OURS)
OVERLAPS = sharing(QWEN3, *OURS, "--enable-two-batch-overlap")
LOADS = {"64 short": (64, 60), "8 long": (8, LONG)}


def test_both_halves_within_t_and_the_same_answers(seen: See) -> None:
    """Beside the same server without; faster or slower, by load."""
    texts = prompts(16, LONG)
    with start(PLAIN) as plain, start(OVERLAPS) as server:
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
