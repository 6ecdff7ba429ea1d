"""The real server over all GPUs with quantised experts, as checkpoints have them on disk: int4 of
Kimi-K2-Thinking's size, FP8 per channel of GLM-4.6's.

Against the stock host, by the distance that the stock host has to itself when its tensor
parallelism adds the same sums in another order.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from moe_plugin.kernels.formats import FP8_CHANNEL, INT4_G32, Format

from ..support.random_load import RandomLoad
from ..support.server_checks import answers_alone
from ..support.serving.checkpoint import QWEN3_30B_LAYERS, Shape, write_checkpoint
from ..support.serving.quantised_checkpoint import write_quantised
from ..support.serving.server import Server
from .beside_stock import (
    GPUS,
    check_as_close_as_the_host_to_itself,
    our_launch,
    stock_launches,
    stock_logprobs,
)
from .launches import Launch, serve

LAYERS = 4
STANDS_FOR = "-stands-for"
"""Ends the name of the checkpoint with what quantised weights stand for."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model whose experts are quantised.

    Attributes:
        format: of its experts.
        hidden: hidden size.
        inter: of an expert.
        experts: as many as one of two ranks holds, twice.
        same_weights: whether the stock host serves the same checkpoint without an all-to-all; else
            it serves what the weights stand for.
    """

    format: Format
    hidden: int
    inter: int
    experts: int
    same_weights: bool

    def shape(self, gpus: int) -> Shape:
        """Its experts behind Qwen3's attention."""
        return replace(
            QWEN3_30B_LAYERS, num_hidden_layers=LAYERS, hidden_size=self.hidden,
            moe_intermediate_size=self.inter, num_experts=self.experts * max(1, gpus // 2),
        )  # fmt: skip


SERVED = {
    "kimi-int4": Served(INT4_G32, 7168, 2048, 24, same_weights=False),
    "glm-fp8-channel": Served(FP8_CHANNEL, 5120, 1536, 32, same_weights=True),
}
# Bounds of a KV cache with which other servers may be on the same GPUs.
SMALL = ("--mem-fraction-static", "0.95", "--max-total-tokens", "65536")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.timeout(1300),
    pytest.mark.skipif(GPUS < 2, reason=f"requires 2 or more GPUs, got {GPUS}"),
    pytest.mark.skipif(
        importlib.util.find_spec("deep_ep") is None, reason="requires the deep_ep package"
    ),
]


def ours(name: str, gpus: int) -> Launch:
    """Our server of a model."""
    launch = our_launch(name, gpus)
    return replace(launch, flags=(*launch.flags, *SMALL))


def stocks(name: str, gpus: int) -> tuple[Launch, Launch]:
    """The stock host's servers of it."""
    return stock_launches(name if SERVED[name].same_weights else name + STANDS_FOR, gpus)


@pytest.fixture(scope="module", params=SERVED)
def name(request: pytest.FixtureRequest) -> str:
    """Of a model in ``SERVED``."""
    return str(request.param)


@pytest.fixture(scope="module")
def models(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Its checkpoints, by the names that launches have of them."""
    folder = tmp_path_factory.mktemp("model")
    shape = SERVED[name].shape(GPUS)
    write_checkpoint(folder / "made", shape, dtype=torch.bfloat16, device="cuda")
    quantised, plain = write_quantised(folder / "made", folder, SERVED[name].format, "cuda")
    shutil.rmtree(folder / "made")
    torch.cuda.empty_cache()
    yield {name: quantised, name + STANDS_FOR: plain}
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def stock(name: str, models: dict[str, Path]) -> list[list[float]]:
    """Of the stock host: on one GPU, and tensor-parallel."""
    launches = stocks(name, GPUS)
    return stock_logprobs(launches, models[launches[0].model])


@pytest.fixture(scope="module")
def served(name: str, models: dict[str, Path], stock: list[list[float]]) -> Iterator[Server]:
    """Ours on the quantised checkpoint; after ``stock``, so that it has the GPUs to itself."""
    with serve(ours(name, GPUS), models[name]) as server:
        yield server.wait_ready(400)


def test_as_close_to_the_stock_host_as_the_host_to_itself(
    served: Server, stock: list[list[float]]
) -> None:
    """Mean distance of teacher-forced log-probabilities."""
    check_as_close_as_the_host_to_itself(served, stock)


def test_random_load(served: Server) -> None:
    """No request lost, with prefill and decode graphs."""
    found = RandomLoad(served, GPUS, longest=7900, new_tokens=200, clients=8 * GPUS).run(30, 10_000)
    print(found)
    assert not found["problems"]
    assert min(found["steps"]) > 100


def test_within_plan(served: Server) -> None:
    """Rows on every rank, and our experts in every layer."""
    states = served.states()
    assert len(states) == GPUS
    for state in states:
        plan, found = state["plan"], state["max_rows_any_rank"]
        assert plan["runner"] == "moe_plugin"
        assert set(state["layer_forwards"]) == {str(layer) for layer in range(LAYERS)}
        assert max(found.values()) <= plan["max_dispatch_tokens_per_rank"]


def test_a_weight_update_that_sends_nothing_changes_nothing(served: Server) -> None:
    """Experts are unpacked and repacked where captured graphs read them."""
    before = answers_alone(served)
    for path in ("/begin_weight_update", "/end_weight_update"):
        done = served.post(path, {})
        assert done["success"], (path, done)
    assert answers_alone(served) == before
