"""Ours on all GPUs beside the stock host, by the distance that the stock host has to itself when
its tensor parallelism adds the same sums in another order."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from ..support import gpu_environment
from ..support.server_checks import forced_logprobs, mean_distance
from ..support.serving.prompts import long_prompt
from ..support.serving.server import LAUNCH_SERVER, Server

GPUS = torch.cuda.device_count()
# No FlashInfer in the slim stack of a GPU host without a network.
BACKENDS = ("--attention-backend", "triton", "--sampling-backend", "pytorch")
STOCK = {"MOE_PLUGIN_DISABLE": "1"}
PROMPTS = (long_prompt(300), long_prompt(700)[13:], long_prompt(1500)[29:], long_prompt(260)[5:])
DISTANCE_FACTOR = 4.0


def stock_logprobs(model: Path) -> list[list[float]]:
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


def ours(model: Path) -> Server:
    """Ours on all GPUs, an attention-DP group each; not ready yet."""
    size = str(GPUS)
    args = (*BACKENDS, "--tp-size", size, "--attn-dp-size", size, "--use-batched-dp-moe", "on")
    return Server(args, model, ranks=0, env=gpu_environment.DEEPEP, command=LAUNCH_SERVER)


def check_as_close_as_the_host_to_itself(served: Server, stock: list[list[float]]) -> None:
    """Mean distance of teacher-forced log-probabilities."""
    one, parallel = stock
    bound = DISTANCE_FACTOR * mean_distance(one, parallel)
    distance = mean_distance(forced_logprobs(served, PROMPTS), one)
    print(f"distance {distance:.2e}, bound {bound:.2e}")
    assert distance <= bound
