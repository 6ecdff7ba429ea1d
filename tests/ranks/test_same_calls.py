"""Ranks in different modes make the same calls; a difference is an error at once, not a hang."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from moe_plugin.errors import MoePluginError
from moe_plugin.runtime.config import BatchedMoEConfig
from moe_plugin.runtime.runner import ExpertWeights, make_moe_runner
from moe_plugin.runtime.stats import Stats
from moe_plugin.runtime.transports.guarded import GuardedTransport
from moe_plugin.runtime.transports.torch_dist import TorchTransport

from ..support.counting import CallsDiffer, CountingTransport
from ..support.ranks import run_ranks

T, LAYERS, EXPERTS, HIDDEN, TOP_K = 16, 3, 8, 32, 2
MODES = {"prefill": T, "short prefill": 3, "decode": 2, "idle": 0}
STEPS = 40
DIFFERENCES = ("one layer less", "another T", "no step")


class _Model:
    """MoE layers over a counted transport; a step runs each once, with the rows of its mode."""

    def __init__(self, group: Any) -> None:
        self.stats = Stats()
        counting = CountingTransport(TorchTransport(group), group)
        self.transport = GuardedTransport(counting, T, stats=self.stats)
        self.config = BatchedMoEConfig(
            num_experts=EXPERTS, num_ranks=group.size(), top_k=TOP_K, hidden_size=HIDDEN,
            intermediate_size=16, max_num_tokens=T,
        )  # fmt: skip
        local = EXPERTS // group.size()
        self.weights = ExpertWeights(torch.ones(local, 32, HIDDEN), torch.ones(local, HIDDEN, 16))
        self.runner = make_moe_runner(self.config, "cpu")

    def step(self, rows: int, layers: int = LAYERS) -> None:
        """One forward, and its end."""
        for _ in range(layers):
            self.runner.forward(
                self.transport,
                torch.ones(rows, HIDDEN),
                torch.arange(rows * TOP_K).view(rows, TOP_K) % EXPERTS,
                torch.ones(rows, TOP_K),
                self.weights,
            )
        self.stats.check_calls()
        self.transport.end_step()


def _any_mixture(group: Any) -> tuple[int, set[tuple[str, ...]]]:
    model, rng, seen = _Model(group), random.Random(0), set()
    for _ in range(STEPS):
        modes = tuple(rng.choice(list(MODES)) for _ in range(group.size()))
        seen.add(modes)
        model.step(MODES[modes[group.rank()]])
    return model.transport.calls, seen


def _seconds_to_error(group: Any, what: str) -> tuple[float, str]:
    model = _Model(group)
    model.step(2)
    odd = group.rank() == group.size() - 1
    began = time.monotonic()
    try:
        if what == "one layer less":
            model.step(2, LAYERS - odd)
        elif what == "another T":
            model.transport.low_latency_dispatch(
                torch.ones(1, HIDDEN), torch.zeros(1, TOP_K, dtype=torch.int64),
                T // 2 if odd else T, EXPERTS, use_fp8=False,
            )  # fmt: skip
        elif odd:  # no step at all
            model.transport.end_step()
        else:
            model.step(2)
    except CallsDiffer as error:
        return time.monotonic() - began, str(error)
    return time.monotonic() - began, ""


def _everything(group: Any) -> tuple[Any, ...]:
    return _any_mixture(group), {what: _seconds_to_error(group, what) for what in DIFFERENCES}


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_calls_or_an_error_on_every_rank(ranks: int) -> None:
    """Any mixture of modes, each rank with its own rows and no word about the others'; and within
    a second of a difference what each rank was about to do."""
    for (calls, seen), errors in run_ranks(ranks, _everything):
        assert calls == STEPS * (2 * LAYERS + 1)
        assert len(seen) > len(MODES)
        for what, (seconds, told) in errors.items():
            assert f"rank {ranks - 1}:" in told, what
            assert seconds < 1.0, what


def test_a_dispatch_without_its_combine_is_refused_between_steps() -> None:
    """The double buffer would be out of step from then on."""
    stats = Stats()
    stats.dispatches, stats.combines = 7, 6
    with pytest.raises(MoePluginError, match="7 dispatches and 6 combines"):
        stats.check_calls()
