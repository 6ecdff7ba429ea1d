"""The real server over all GPUs of this machine: one rank each, DeepEP low latency, our budgets.

Against the stock host on one GPU, by the distance that the stock host has to itself when its
tensor parallelism adds the same sums in another order.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.random_load import RandomLoad
from ..support.rank_killed import check_killed_rank_ends_the_server
from ..support.server_checks import (
    check_idle_ranks,
    check_mixed_prompts,
    check_same_bits,
    check_steps,
    check_unequal_load,
    check_within_plan,
)
from ..support.serving.server import Server
from .beside_stock import (
    GPUS,
    check_as_close_as_the_host_to_itself,
    our_launch,
    stock_launches,
    stock_logprobs,
)
from .launches import LAYERS, MODEL, serve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.timeout(1300),  # the first fixture waits for two servers
    pytest.mark.skipif(GPUS < 2, reason=f"requires 2 or more GPUs, got {GPUS}"),
    pytest.mark.skipif(
        importlib.util.find_spec("deep_ep") is None, reason="requires the deep_ep package"
    ),
]


@pytest.fixture(scope="module")
def stock(model: Path) -> list[list[float]]:
    """Of the stock host: on one GPU, and tensor-parallel."""
    return stock_logprobs(stock_launches(MODEL, GPUS), model)


@pytest.fixture(scope="module")
def served(model: Path, stock: list[list[float]]) -> Iterator[Server]:
    """Ours on all GPUs; after ``stock``, so that it has them to itself."""
    with serve(our_launch(MODEL, GPUS), model) as server:
        yield server.wait_ready(400)


def test_as_close_to_the_stock_host_as_the_host_to_itself(
    served: Server, stock: list[list[float]]
) -> None:
    """Mean distance of teacher-forced log-probabilities."""
    check_as_close_as_the_host_to_itself(served, stock)


def test_64_concurrent_prompts(served: Server) -> None:
    """From one token to sixteen times the default budget."""
    check_mixed_prompts(served, 64, (1, 7, 63, 256, 257, 1000, 4000), 32)


def test_idle_ranks(served: Server) -> None:
    """One request on N ranks."""
    check_idle_ranks(served, 32)


def test_unequal_load(served: Server) -> None:
    """Long prompts on one rank only."""
    check_unequal_load(served, GPUS, 4000, 32)


def test_same_bits_while_others_prefill(served: Server) -> None:
    """Each group replays its own graphs."""
    check_same_bits(served, GPUS, 4000, 64)


def test_random_load(served: Server) -> None:
    """10,000 steps, or as many as two minutes hold; stage `soak` of the serving bench is longer."""
    load = RandomLoad(served, GPUS, longest=7900, new_tokens=200, clients=8 * GPUS)
    found = load.run(120, 10_000)
    print(found)
    assert not found["problems"]
    assert min(found["steps"]) > 100


def test_within_plan(served: Server) -> None:
    """Rows and buffer bytes, on every rank."""
    check_within_plan(served, GPUS, LAYERS)


def test_steps_that_replay_are_counted(served: Server) -> None:
    """Where no Python of the model runs."""
    check_steps(served, replayed=True)


def test_a_killed_rank_ends_the_server(served: Server) -> None:
    """Last: the server is gone after it."""
    seconds = check_killed_rank_ends_the_server(served, GPUS, peers_hang=False)
    print(f"server gone {seconds:.1f} s after its rank")
