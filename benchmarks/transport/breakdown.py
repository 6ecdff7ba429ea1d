"""Where a layer's time goes, kernel by kernel, from the profiler's trace of its CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

PARTS = ("dispatch", "w13 + activation", "w2", "combine")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a trace; times in us."""

    name: str
    start: float
    end: float


def segments(kernels: Sequence[Kernel]) -> list[dict[str, float]]:
    """us of each part, layer by layer.

    A part lasts from the end of the one before to its own last kernel's end, so that the parts add
    up to the layer and gaps between kernels count. The second expert kernel starts while the first
    still runs; by this rule the overlap is the first one's. The activation has no kernel of its
    own.
    """
    layers: list[dict[str, float]] = []
    part, edge = "combine", 0.0
    for kernel in sorted(kernels, key=lambda k: k.start):
        following = _part(kernel.name, part)
        if following == "dispatch" and part != "dispatch":
            layers.append(dict.fromkeys(PARTS, 0.0))
            edge = kernel.start
        if layers and kernel.end > edge:
            layers[-1][following] += kernel.end - edge
            edge = kernel.end
        part = following
    return layers


def _part(name: str, before: str) -> str:
    lower = name.lower()
    for transfer in ("dispatch", "combine"):
        if transfer in lower:
            return transfer
    if "experts" not in lower and "gemm" not in lower:
        return before  # a fill or a copy belongs to what came before it
    return "w13 + activation" if before == "dispatch" else "w2"


def trace(replay: Callable[[], None], times: int) -> list[Kernel]:
    """Every kernel of ``times`` replays."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(times):
            replay()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Mem")
    ]
