"""The real server over all GPUs with int4 experts of Kimi-K2-Thinking's size, packed on disk.

Against the stock host on the weights that these stand for, by the distance that the stock host has
to itself when its tensor parallelism adds the same sums in another order.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_plugin.kernels.formats import INT4_G32

from ..support.random_load import RandomLoad
from ..support.server_checks import check_within_plan
from ..support.serving.checkpoint import QWEN3_30B_LAYERS, Shape, write_checkpoint
from ..support.serving.int4_checkpoint import write_int4
from ..support.serving.prompts import SHORT_PROMPTS
from ..support.serving.server import Server
from .beside_stock import (
    GPUS,
    check_as_close_as_the_host_to_itself,
    our_launch,
    stock_launches,
    stock_logprobs,
)
from .launches import serve

PACKED, PLAIN = "kimi-int4", "kimi-bf16"


def shape(gpus: int) -> Shape:
    """Experts of Kimi-K2's dimensions, as many as sixteen ranks hold each; Qwen3's attention,
    narrow."""
    return replace(
        QWEN3_30B_LAYERS, num_hidden_layers=4, hidden_size=7168, moe_intermediate_size=2048,
        num_experts=24 * max(1, gpus // 2), num_attention_heads=32,
    )  # fmt: skip


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
    write_checkpoint(folder / "made", shape(GPUS), dtype=torch.bfloat16, device="cuda")
    written = write_int4(folder / "made", folder, INT4_G32, "cuda")
    shutil.rmtree(folder / "made")
    torch.cuda.empty_cache()
    return written


@pytest.fixture(scope="module")
def stock(models: tuple[Path, Path]) -> list[list[float]]:
    """Of the stock host: on one GPU, and tensor-parallel."""
    return stock_logprobs(stock_launches(PLAIN, GPUS), models[1])


@pytest.fixture(scope="module")
def served(models: tuple[Path, Path], stock: list[list[float]]) -> Iterator[Server]:
    """Ours on the packed checkpoint; after ``stock``, so that it has the GPUs to itself."""
    with serve(our_launch(PACKED, GPUS), models[0]) as server:
        yield server.wait_ready(400)


def test_as_close_to_the_stock_host_as_the_host_to_itself(
    served: Server, stock: list[list[float]]
) -> None:
    """Mean distance of teacher-forced log-probabilities."""
    check_as_close_as_the_host_to_itself(served, stock)


def test_random_load(served: Server) -> None:
    """No request lost, with prefill and decode graphs."""
    found = RandomLoad(served, GPUS, longest=7900, new_tokens=200, clients=8 * GPUS).run(60, 10_000)
    print(found)
    assert not found["problems"]
    assert min(found["steps"]) > 100


def test_within_plan(served: Server) -> None:
    """Rows and buffer bytes, on every rank."""
    check_within_plan(served, GPUS, shape(GPUS).num_hidden_layers)


def test_a_weight_update_that_sends_nothing_changes_nothing(served: Server) -> None:
    """Experts are unpacked and repacked where captured graphs read them."""

    def alone() -> list[object]:
        """Requests without company, their prefix cached: same bits for the same weights."""
        answers = [served.generate(text, 24, routed_dp_rank=0) for text in 2 * SHORT_PROMPTS[:4]]
        return [(answer["tokens"], answer["logprobs"]) for answer in answers[4:]]

    before = alone()
    for path in ("/begin_weight_update", "/end_weight_update"):
        done = served.post(path, {})
        assert done["success"], (path, done)
    assert alone() == before
