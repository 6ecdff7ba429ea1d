"""Multi-token prediction: DeepSeek-V3's shape with its NextN layer as a draft, on DeepEP itself."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from statistics import fmean

import pytest

from ...support.random_load import RandomLoad
from ...support.serving.server import Server
from .answers import Answer, ask, check_greedy, prompts
from .machine import (
    DEEPSEEK,
    LOAD_S,
    LONG,
    OURS,
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

FEATURE = "speculation"
pytestmark = [
    *on_two_gpus,
    gpu_only,
    pytest.mark.skipif(
        find_spec("flash_mla") is None,
        reason="requires the flash_mla package, which SGLang imports to capture drafts",
    ),
]

NEW_TOKENS = 48
TEXTS = prompts(16, LONG)


def nextn(steps: int, top_k: int = 1) -> tuple[str, ...]:
    """Flags of a width of ``steps + 1``, or of a tree."""
    width = steps + 1 if top_k == 1 else 8
    return (
        *("--speculative-algorithm", "NEXTN", "--speculative-num-steps", str(steps)),
        *("--speculative-eagle-topk", str(top_k), "--speculative-num-draft-tokens", str(width)),
        *("--max-running-requests", "64"),
    )


PLAIN = sharing(DEEPSEEK, *OURS)
SPECULATES = {
    shape: sharing(DEEPSEEK, *OURS, *nextn(*shape)) for shape in ((3, 1), (1, 1), (7, 1), (3, 2))
}
"""By steps and branches."""


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    """The same server without speculation; tests wait for it."""
    with start(PLAIN) as server:
        yield server


@pytest.fixture(scope="module")
def own(plain: Server) -> list[Answer]:
    """Its answers."""
    ready(plain)
    with turn():
        return ask(plain, TEXTS, NEW_TOKENS)


@pytest.mark.parametrize(("steps", "top_k"), SPECULATES)
def test_greedy_answers_are_those_without_speculation(
    plain: Server, steps: int, top_k: int, seen: See, request: pytest.FixtureRequest
) -> None:
    """Verify and draft graphs within T; then a mixed load."""
    with start(SPECULATES[steps, top_k]) as server:
        own = request.getfixturevalue("own")  # both servers start at once
        ready(server)
        with turn():
            answers = ask(server, TEXTS, NEW_TOKENS)
            text = check_greedy(plain, own, answers)
            accepted = fmean(answer["meta"]["spec_accept_length"] for answer in answers)
            loaded = RandomLoad(server, RANKS, longest=LONG, new_tokens=64, clients=16)
            found = loaded.run(LOAD_S, 10**6)
            speed = {
                "speculative": timed(server, TEXTS, NEW_TOKENS).figures(),
                "plain": timed(plain, TEXTS, NEW_TOKENS).figures(),
            }
            rows = largest_rows(server)
            log = server.log()
    assert not found["problems"]
    assert "accept len" in log
    assert accepted > 1.05, "the draft is never right: nothing was verified"
    shape = f"width {steps + 1}" if top_k == 1 else f"a tree of {top_k} branches and 8 tokens"
    seen(
        f"{shape}: {text}; {accepted:.2f} tokens accepted per step",
        rows=rows,
        accepted=round(accepted, 3),
        load=found,
        timed=speed,
    )
