"""Planned against logged bytes on one GPU, and the KV cache of a typed fraction against the stock
host's.

Each server has a GPU to itself: the host sizes its KV cache by what is free.
"""

from __future__ import annotations

import importlib.util
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ..support import gpu_environment
from .launches import BACKENDS, DISABLED, MODEL, Launch, serve

GPUS = torch.cuda.device_count()
# What the stock host's own 128 tokens per rank carry.
BY_HAND = (
    *("--moe-a2a-backend", "deepep", "--deepep-mode", "low_latency"),
    *("--moe-runner-backend", "deep_gemm"),  # which the stock host does not pick for bf16
    *("--chunked-prefill-size", "128", "--max-running-requests", "128"),
    *("--cuda-graph-max-bs-decode", "64", "--disable-prefill-cuda-graph"),
)
FRACTION = 0.8
TYPED = (*BACKENDS, *BY_HAND, "--mem-fraction-static", str(FRACTION))
STOCK = DISABLED | {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "128"}
NOTHING_TYPED = Launch(MODEL, (*BACKENDS, "--use-batched-dp-moe", "on"), gpu_environment.DEEPEP)
BY_HAND_STOCK = Launch(MODEL, TYPED, gpu_environment.DEEPEP | STOCK)
BY_HAND_OURS = Launch(MODEL, TYPED, gpu_environment.DEEPEP, {"runner": "host"})
GIB = 1 << 30

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.timeout(1300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec("deep_ep") is None, reason="requires the deep_ep package"
    ),
]


def served(
    launch: Launch, model: Path, gpu: int = 0
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """(GiB as the host logs them, the plan's memory) of a server that answers one request."""
    env = {"CUDA_VISIBLE_DEVICES": str(gpu)} if GPUS > 1 else {}
    with serve(launch, model, env) as server:
        server.wait_ready(600)
        server.generate("a prompt", 8)
        log, states = server.log(), server.states()
    found = {
        "before": float(re.search(r"Load weight begin. avail mem=([\d.]+)", log)[1]),  # type: ignore[index]
        "weights": float(re.search(r"Load weight end.*?mem usage=([\d.]+)", log)[1]),  # type: ignore[index]
        "kv": sum(map(float, re.search(  # type: ignore[union-attr]
            r"K size: ([\d.]+) GB, V size: ([\d.]+)", log).groups())),
    }  # fmt: skip
    print(f"{' '.join(launch.flags)}: {found}, {states[0]['plan']['memory'] if states else None}")
    return found, states[0]["plan"]["memory"] if states else None


def test_planned_bytes_are_the_logged_ones(model: Path) -> None:
    """Nothing typed: weights within 3 %, and the KV cache is what was planned or up to 2 GiB more,
    which is what the plan leaves for a busy host."""
    logged, memory = served(NOTHING_TYPED, model)
    assert memory is not None
    assert memory["weights_bytes"] / GIB == pytest.approx(logged["weights"], rel=0.03)
    assert memory["usable_bytes"] / GIB <= logged["before"]
    assert -0.1 <= logged["kv"] - memory["kv_cache_bytes"] / GIB <= 2


def test_a_typed_fraction_leaves_the_stock_hosts_kv_cache(model: Path) -> None:
    """The buffer comes out of what the fraction keeps back, on both."""
    with ThreadPoolExecutor(min(GPUS, 2)) as pool:  # one after the other where they would share
        stopped = pool.submit(served, BY_HAND_STOCK, model)
        active = pool.submit(served, BY_HAND_OURS, model, gpu=1)
    stock, _ = stopped.result()
    ours, memory = active.result()
    assert memory is not None
    assert memory["mem_fraction_static"] == FRACTION
    assert ours["kv"] >= stock["kv"] - 0.1
    assert -0.1 <= ours["kv"] - memory["kv_cache_bytes"] / GIB <= 2
