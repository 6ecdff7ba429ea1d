"""The GPU tests' own cases on CPU ranks: the torch transport stands for DeepEP."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_plugin.kernels.experts_torch import quantise_groups_torch
from moe_plugin.runtime.stats import Stats
from moe_plugin.runtime.transports.guarded import GuardedTransport
from moe_plugin.runtime.transports.torch_dist import TorchTransport

from ..gpu.case_runner import NAMES, run_cases
from ..gpu.world import Sizes, World

SIZES = Sizes(capacity=8, hidden=256, inter=128, experts=6, top_k=3, round_trips=20)


class DeepEPStandIn(TorchTransport):
    """The torch transport with DeepEP's habits: FP8 dispatch, two buffers, strict arguments.

    FP8 rounds received rows; DeepEP rounds them before it sends: row by row, the same thing.
    """

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self._pending = ""
        self._in_flight: list[Any] = []

    def low_latency_dispatch(
        self, x: Any, topk_idx: Any, capacity: int, experts: int, *, use_fp8: bool = True, **_: Any
    ) -> Any:
        assert (x.dtype, topk_idx.dtype) == (torch.bfloat16, torch.int64)
        assert x.is_contiguous()
        assert topk_idx.is_contiguous()
        self._send("dispatch")
        assert len(self._in_flight) < 2, "DeepEP keeps two dispatches at most"
        recv, count, handle, event, _hook = super().low_latency_dispatch(
            x, topk_idx, capacity, experts, use_fp8=False
        )
        if use_fp8:
            data, scale = quantise_groups_torch(recv)
            recv = data, scale.transpose(1, 2).contiguous().transpose(1, 2)
        self._in_flight.append(handle)
        return recv, count, handle, event, self._receive

    def low_latency_combine(
        self, x: Any, topk_idx: Any, topk_weights: Any, handle: Any, **_: Any
    ) -> Any:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert x.shape == (
            handle.num_experts // self.group_size,
            *handle.src_info.shape[1:],
            handle.hidden,
        )
        assert topk_weights.dtype == torch.float32
        self._send("combine")
        assert self._in_flight.pop(0) is handle, "combined in the order of the dispatches"
        out, event, _hook = super().low_latency_combine(x, topk_idx, topk_weights, handle)
        return out, event, self._receive

    def _send(self, what: str) -> None:
        # A send clears the other buffer's arrival counters, whether or not they were read.
        assert not self._pending, f"{what} while {self._pending} was sent and not received"
        self._pending = what

    def _receive(self) -> None:
        assert self._pending
        self._pending = ""


def _cpu_world(group: Any, transport: type[TorchTransport]) -> World:
    cpu = torch.device("cpu")
    guarded = GuardedTransport(transport(group), SIZES.capacity, stats=Stats())
    return World(group, guarded, cpu, TorchTransport(group), cpu, SIZES)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_case_holds(ranks: int) -> None:
    """What is asked of DeepEP on GPUs is true of its CPU stand-in."""
    outcome = run_cases(ranks, _cpu_world, DeepEPStandIn, limit_s=60, timeout_s=300)
    assert outcome == dict.fromkeys(NAMES, "")


class _Wrong(DeepEPStandIn):
    """Loses a row's weight, and raises where two dispatches are combined."""

    def low_latency_combine(
        self, x: Any, topk_idx: Any, topk_weights: Any, handle: Any, **options: Any
    ) -> Any:
        if len(topk_idx) == SIZES.capacity // 2:
            raise ValueError("half a batch")
        return super().low_latency_combine(x, topk_idx, topk_weights * 0.9, handle, **options)


def test_failures_are_told_by_name() -> None:
    """A wrong sum fails its case alone; an exception ends the run and names itself."""
    outcome = run_cases(2, _cpu_world, _Wrong, limit_s=60, timeout_s=300)
    assert outcome["create"] == outcome["layer, all idle, random"] == outcome["no expert"] == ""
    assert "error" in outcome["layer, T, random"]
    assert "half a batch" in outcome["graphs of two sizes"]
    assert "rank 1: not run" in outcome["two in flight"]
    assert "graphs of two sizes failed on rank(s) [0, 1]" in outcome["processes end"]
