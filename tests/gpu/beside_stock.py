"""Ours on all GPUs beside the stock host, by the distance that the stock host has to itself when
its tensor parallelism adds the same sums in another order."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from ..support import gpu_environment
from ..support.server_checks import forced_logprobs, mean_distance
from ..support.serving.prompts import long_prompt
from ..support.serving.server import Server
from .launches import BACKENDS, DISABLED, Launch, serve

GPUS = torch.cuda.device_count()
PROMPTS = (long_prompt(300), long_prompt(700)[13:], long_prompt(1500)[29:], long_prompt(260)[5:])
DISTANCE_FACTOR = 4.0


def stock_launches(model: str, gpus: int) -> tuple[Launch, Launch]:
    """The stock host on one GPU, and tensor-parallel on all of them.

    Both run at once, since a start is mostly imports; so neither sizes its KV cache by what is
    free.
    """
    graphs_off = ("--disable-prefill-cuda-graph", "--disable-decode-cuda-graph")
    small = ("--mem-fraction-static", "0.95", "--max-total-tokens", "16384")
    one, parallel = (
        Launch(
            model,
            (*BACKENDS, *graphs_off, *small, "--tp-size", str(size)),
            gpu_environment.DEEPEP | DISABLED,
        )
        for size in (1, gpus)
    )
    return one, parallel


def our_launch(model: str, gpus: int) -> Launch:
    """Ours on all GPUs, an attention-DP group each."""
    size = str(gpus)
    flags = (*BACKENDS, "--tp-size", size, "--attn-dp-size", size, "--use-batched-dp-moe", "on")
    planned = {"groups_apart": True, "ep_size": gpus}
    return Launch(model, flags, gpu_environment.DEEPEP, planned)


def stock_logprobs(launches: Sequence[Launch], model: Path) -> list[list[float]]:
    """Teacher-forced log-probabilities of each launch's server."""
    with ExitStack() as stack:
        servers = [stack.enter_context(serve(launch, model)) for launch in launches]
        return [forced_logprobs(server.wait_ready(400), PROMPTS) for server in servers]


def check_as_close_as_the_host_to_itself(served: Server, stock: list[list[float]]) -> None:
    """Mean distance of teacher-forced log-probabilities."""
    one, parallel = stock
    bound = DISTANCE_FACTOR * mean_distance(one, parallel)
    distance = mean_distance(forced_logprobs(served, PROMPTS), one)
    print(f"distance {distance:.2e}, bound {bound:.2e}")
    assert distance <= bound
