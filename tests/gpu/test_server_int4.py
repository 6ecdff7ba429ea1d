"""The real server over all GPUs with int4 experts of Kimi-K2-Thinking's size, packed on disk.

Against the stock host on the weights that these stand for, by the distance that the stock host has
to itself when its tensor parallelism adds the same sums in another order.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_plugin.kernels.formats import INT4_G32

from ..support import gpu_environment
from ..support.random_load import RandomLoad
from ..support.server_checks import check_within_plan, forced_logprobs, mean_distance
from ..support.serving.checkpoint import QWEN3_30B_LAYERS, write_checkpoint
from ..support.serving.int4_checkpoint import write_int4
from ..support.serving.prompts import long_prompt
from ..support.serving.server import LAUNCH_SERVER, Server

GPUS = torch.cuda.device_count()
# Experts of Kimi-K2's dimensions, as many as sixteen ranks hold each; Qwen3's attention, narrow.
SHAPE = replace(
    QWEN3_30B_LAYERS, num_hidden_layers=4, hidden_size=7168, moe_intermediate_size=2048,
    num_experts=24 * max(1, GPUS // 2), num_attention_heads=32,
)  # fmt: skip
BACKENDS = ("--attention-backend", "triton", "--sampling-backend", "pytorch")
PROMPTS = (long_prompt(300), long_prompt(700)[13:], long_prompt(1500)[29:], long_prompt(260)[5:])
DISTANCE_FACTOR = 4.0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.timeout(1300),
    pytest.mark.skipif(GPUS < 2, reason=f"requires 2 or more GPUs, got {GPUS}"),
    pytest.mark.skipif(
        importlib.util.find_spec("deep_ep") is None, reason="requires the deep_ep package"
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(packed, plain) checkpoints."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder / "made", SHAPE, dtype=torch.bfloat16, device="cuda")
    written = write_int4(folder / "made", folder, INT4_G32, "cuda")
    shutil.rmtree(folder / "made")
    torch.cuda.empty_cache()
    return written


@pytest.fixture(scope="module")
def stock(models: tuple[Path, Path]) -> list[list[float]]:
    """Teacher-forced log-probabilities of the stock host: on one GPU, and tensor-parallel."""
    args = (
        *BACKENDS, "--disable-prefill-cuda-graph", "--disable-decode-cuda-graph",
        "--mem-fraction-static", "0.95", "--max-total-tokens", "16384",
    )  # fmt: skip
    env = gpu_environment.DEEPEP | {"MOE_PLUGIN_DISABLE": "1"}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                Server(
                    (*args, "--tp-size", str(size)), models[1], ranks=0, env=env,
                    command=LAUNCH_SERVER,
                )
            )
            for size in (1, GPUS)
        ]  # fmt: skip
        return [forced_logprobs(server.wait_ready(400), PROMPTS) for server in servers]


@pytest.fixture(scope="module")
def served(models: tuple[Path, Path], stock: list[list[float]]) -> Iterator[Server]:
    """Ours on the packed checkpoint; after ``stock``, so that it has the GPUs to itself."""
    size = str(GPUS)
    args = (*BACKENDS, "--tp-size", size, "--attn-dp-size", size, "--use-batched-dp-moe", "on")
    env = gpu_environment.DEEPEP
    with Server(args, models[0], ranks=0, env=env, command=LAUNCH_SERVER) as server:
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


def test_random_load(served: Server) -> None:
    """No request lost, with prefill and decode graphs."""
    found = RandomLoad(served, GPUS, longest=7900, new_tokens=200, clients=8 * GPUS).run(60, 10_000)
    print(found)
    assert not found["problems"]
    assert min(found["steps"]) > 100


def test_within_plan(served: Server) -> None:
    """Rows and buffer bytes, on every rank."""
    check_within_plan(served, GPUS, SHAPE.num_hidden_layers)
