"""Seconds of one step: of its CUDA graph, of the eager calls, or of plain calls on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

Step = Callable[[], object]


def seconds_of(
    step: Step, group: dist.ProcessGroup, *, on_gpu: bool, graph: bool, calls: int, rounds: int
) -> float:
    """Median over ``rounds`` of the mean over ``calls``; all ranks begin a round together.

    Args:
        step: an even number of low-latency calls: each flips DeepEP's double buffer, and a graph
            bakes it in.
        group: of the hosts.
        on_gpu: time by events on the GPU, not by the host's clock.
        graph: replay ``calls`` captured steps; otherwise call it ``calls`` times.
        calls: of the step, in one round.
        rounds: samples.
    """
    run = captured(step, calls) if graph else repeated(step, calls)
    samples = []
    for _ in range(rounds + 1):
        _synchronise(on_gpu)
        dist.barrier(group)
        samples.append(gpu_seconds(run) if on_gpu else _host_seconds(run))
    return median(samples[1:]) / calls  # the first one warms up


def captured(step: Step, calls: int) -> Callable[[], None]:
    """Replays a CUDA graph of ``calls`` steps."""
    warm = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            step()
    return graph.replay


def repeated(step: Step, calls: int) -> Callable[[], None]:
    """Calls ``step`` that often."""

    def run() -> None:
        for _ in range(calls):
            step()

    return run


def gpu_seconds(run: Callable[[], None]) -> float:
    """By events around it on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _host_seconds(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _synchronise(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
