"""Attention TP 2: one DP group on two ranks, which scatter its rows; and its graphs."""

from __future__ import annotations

from .answers import ask, check_greedy, prompts
from .machine import (
    LONG,
    ON,
    OURS,
    QWEN3,
    T,
    gpu_only,
    largest_rows,
    on_two_gpus,
    ready,
    sharing,
    start,
    turn,
)
from .records import See

FEATURE = "attention TP"
pytestmark = on_two_gpus

APART = sharing(QWEN3, *OURS, planned={"attn_tp_size": 1, "groups_apart": True})
ONE_GROUP = sharing(
    QWEN3, *("--tp-size", "2", "--attn-dp-size", "1", *T, *ON), planned={"attn_tp_size": 2}
)
JOINED = sharing(QWEN3, *OURS, "--moe-dense-tp-size", "2", planned={"groups_apart": False})


def test_attention_tp_2_answers_as_two_groups_do(seen: See) -> None:
    """One group of two ranks beside two groups of one: rows are scattered, tokens the same."""
    texts = prompts(16, LONG)
    with start(APART) as apart, start(ONE_GROUP) as joined:
        ready(apart, joined)
        with turn():
            own, others = ask(apart, texts, 24), ask(joined, texts, 24)
            rows = largest_rows(joined)
            (scattered,) = {state["plan"]["attn_tp_size"] for state in joined.states()}
            text = check_greedy(apart, own, others)
    assert scattered == 2
    seen(f"one DP group over two ranks: {text}", rows=rows)


@gpu_only
def test_joined_ends_answer_as_local_ends_do(seen: See) -> None:
    """`--moe-dense-tp-size 2` keeps the groups joined; 1, and the DP LM head, are the default."""
    texts = prompts(8, LONG)
    with start(APART) as local, start(JOINED) as joined:
        ready(local, joined)
        with turn():
            own, others = ask(local, texts, 24), ask(joined, texts, 24)
            text = check_greedy(local, own, others)
            rows = largest_rows(joined)
    seen(f"dense TP 1 and the DP LM head beside joined groups: {text}", rows=rows)
