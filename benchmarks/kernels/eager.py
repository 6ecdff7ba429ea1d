"""What one layer costs the host in a forward that replays no graph."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moe_plugin.kernels.experts import batched_experts
from moe_plugin.kernels.tuning.tune import Buffers, graph_seconds

CALLS, ROUNDS = 64, 30  # of layers between two synchronisations, as a forward has them


def _per_call(calls: list[Callable[[], Any]], *, wait: bool) -> float:
    """Median microseconds of the host per call; `wait` counts until the device is done."""
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for call in calls:
            call()
        if wait:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times[ROUNDS // 3 :]) / len(calls)


def time_eager(buffers: Buffers, rows: int) -> dict[str, float]:
    """Microseconds of one layer with `rows` live rows per expert.

    host_us: the call's own time, with no live row at all, so that the device never holds it up;
    eager_us: a chain of layers until the last has ended; graph_us: the same layers, captured.
    """
    experts = buffers.shape.experts
    none = torch.zeros(experts, dtype=torch.int32, device="cuda")
    counts = torch.full((experts,), rows, dtype=torch.int32, device="cuda")

    def layer(copy: int, masked_m: torch.Tensor) -> Callable[[], Any]:
        args = buffers.layers[copy % len(buffers.layers)]
        return lambda: batched_experts(*args, masked_m, rows)

    idle = [layer(copy, none) for copy in range(CALLS)]
    busy = [layer(copy, counts) for copy in range(CALLS)]
    return {
        "host_us": _per_call(idle, wait=False),
        "eager_us": _per_call(busy, wait=True),
        "graph_us": 1e6 * graph_seconds(busy[:8]),
    }
