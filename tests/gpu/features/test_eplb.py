"""Expert load balancing with redundant experts, rebalanced while requests run."""

from __future__ import annotations

import pytest

from ...support.random_load import RandomLoad
from .answers import ask, check_greedy, prompts
from .machine import (
    DEEPSEEK,
    LOAD_S,
    LONG,
    ON_CPU,
    OURS,
    QWEN3,
    RANKS,
    largest_rows,
    on_two_gpus,
    ready,
    sharing,
    start,
    turn,
)
from .records import See

FEATURE = "EPLB"
pytestmark = on_two_gpus

LEAST_REBALANCES = 2
REDUNDANT = 8
EPLB = (
    *("--enable-eplb", "--ep-num-redundant-experts", str(REDUNDANT)),
    *("--eplb-rebalance-num-iterations", "100", "--expert-distribution-recorder-buffer-size", "50"),
    *("--expert-balancedness-report-mode", "server_log"),
)
SERVED = {
    name: sharing(model, *OURS, *EPLB, planned={"num_experts": experts + REDUNDANT})
    for name, model, experts in (("qwen3", QWEN3, 128), ("deepseek", DEEPSEEK, 32))
}


@pytest.mark.parametrize(
    "shape",
    [
        "qwen3",
        pytest.param(
            "deepseek",
            marks=pytest.mark.skipif(ON_CPU, reason="requires GPUs: MLA and FP8"),
        ),
    ],
)
def test_answers_survive_rebalances(shape: str, seen: See) -> None:
    """Weights move from rank to rank under load, graphs stay captured: the same answers after."""
    texts = prompts(12, LONG)
    with start(SERVED[shape]) as server:
        ready(server)
        with turn():
            before = ask(server, texts, 24)
            load = RandomLoad(server, RANKS, longest=LONG, new_tokens=64, clients=8)
            found = load.run(LOAD_S, 10**6)
            after = ask(server, texts, 24)
            text = check_greedy(server, before, after)
            rows = largest_rows(server)
            (experts,) = {state["plan"]["num_experts"] for state in server.states()}
        log = server.log()
    rebalances = log.count("rebalance end")
    assert not found["problems"]
    assert rebalances >= LEAST_REBALANCES, log[-3000:]
    assert "[Expert Balancedness]" in log, "no counts reached the recorder"
    seen(
        f"{shape}, {experts} physical experts, {rebalances} rebalances logged under load: {text}",
        rows=rows,
        rebalances=rebalances,
        load=found,
    )
