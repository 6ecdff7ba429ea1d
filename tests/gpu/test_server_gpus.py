"""The real server over all GPUs of this machine: one rank each, DeepEP low latency, our budgets.

Against the stock host on one GPU, by the distance that the stock host has to itself when its
tensor parallelism adds the same sums in another order.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from ..support import gpu_environment
from ..support.random_load import RandomLoad
from ..support.rank_killed import check_killed_rank_ends_the_server
from ..support.server_checks import (
    check_idle_ranks,
    check_mixed_prompts,
    check_same_bits,
    check_steps,
    check_unequal_load,
    check_within_plan,
    forced_logprobs,
    mean_distance,
)
from ..support.serving.prompts import long_prompt
from ..support.serving.server import LAUNCH_SERVER, Server

GPUS = torch.cuda.device_count()
LAYERS = 4  # of the model
# No FlashInfer in the slim stack of a GPU host without a network.
BACKENDS = ("--attention-backend", "triton", "--sampling-backend", "pytorch")
STOCK = {"MOE_PLUGIN_DISABLE": "1"}
PROMPTS = (long_prompt(300), long_prompt(700)[13:], long_prompt(1500)[29:], long_prompt(260)[5:])
DISTANCE_FACTOR = 4.0

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
    """Teacher-forced log-probabilities of the stock host: on one GPU, and tensor-parallel.

    Both at once, since a start is mostly imports; so neither may size its KV cache by what is free.
    """
    graphs_off = ("--disable-prefill-cuda-graph", "--disable-decode-cuda-graph")
    small = ("--mem-fraction-static", "0.95", "--max-total-tokens", "16384")
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                Server(
                    (*BACKENDS, *graphs_off, *small, "--tp-size", str(size)),
                    model,
                    ranks=0,
                    env=gpu_environment.DEEPEP | STOCK,
                    command=LAUNCH_SERVER,
                )
            )
            for size in (1, GPUS)
        ]
        return [forced_logprobs(server.wait_ready(400), PROMPTS) for server in servers]


@pytest.fixture(scope="module")
def served(model: Path, stock: list[list[float]]) -> Iterator[Server]:
    """Ours on all GPUs; after ``stock``, so that it has them to itself."""
    size = str(GPUS)
    args = (*BACKENDS, "--tp-size", size, "--attn-dp-size", size, "--use-batched-dp-moe", "on")
    with Server(args, model, ranks=0, env=gpu_environment.DEEPEP, command=LAUNCH_SERVER) as server:
        yield server.wait_ready(400)


def test_as_close_to_the_stock_host_as_the_host_to_itself(
    served: Server, stock: list[list[float]]
) -> None:
    """Mean distance of teacher-forced log-probabilities."""
    one, parallel = stock
    bound = DISTANCE_FACTOR * mean_distance(one, parallel)
    distance = mean_distance(forced_logprobs(served, PROMPTS), one)
    print(f"distance {distance:.2e}, bound {bound:.2e}")
    assert distance <= bound


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
