"""`--enable-deterministic-inference` while each group replays its own graphs."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from ...support.server_checks import check_same_bits
from .answers import prompts
from .machine import (
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

FEATURE = "deterministic inference"
pytestmark = [*on_two_gpus, gpu_only]

RUNS = 10
NEW_TOKENS = 24
SERVED = sharing(QWEN3, *OURS, "--enable-deterministic-inference", planned={"groups_apart": True})


def test_same_bits_over_ten_runs_of_a_mixed_load(seen: See) -> None:
    """The same requests in another order, at other times, on other groups: the same bits."""
    texts = prompts(16, LONG)
    with start(SERVED) as server:
        ready(server)
        runs = []
        with turn():
            for run in range(RUNS):
                order = random.Random(run).sample(range(len(texts)), len(texts))
                with ThreadPoolExecutor(4 + 4 * (run % 4)) as pool:
                    jobs = {i: pool.submit(server.generate, texts[i], NEW_TOKENS) for i in order}
                answers = {i: job.result() for i, job in jobs.items()}
                runs.append(
                    [(answers[i]["tokens"], answers[i]["logprobs"]) for i in range(len(texts))]
                )
                server.post("/flush_cache?timeout=10", {})
            check_same_bits(server, RANKS, LONG, 48)
            rows = largest_rows(server)
    different = [sum(a != b for a, b in zip(runs[0], run, strict=True)) for run in runs]
    assert different == [0] * RUNS, different
    seen(
        f"{RUNS} runs of {len(texts)} prompts of 60 to {LONG} tokens, in other orders, others at "
        "once: the same bits, groups on graphs of their own",
        rows=rows,
    )
