"""Low-latency round trips without a server, as many as fit: no hang, and counters that agree."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ...support import gpu_environment
from ...support.ranks import run_ranks
from ..deepep_world import deepep_world
from ..world import Sizes, World
from .machine import (
    gpu_only,
    on_two_gpus,
    turn,
)
from .records import See

FEATURE = "low-latency round trips"
pytestmark = [*on_two_gpus, gpu_only]

SECONDS = float(os.environ.get("FEATURES_SOAK_S", "60"))
SIZES = Sizes(capacity=128, hidden=2048, inter=128, experts=128, top_k=8)
TRIPS = 16  # in a graph; even, since DeepEP alternates between two buffers
REPLAYS = 200  # between two looks at what came back


def test_round_trips(seen: See) -> None:
    """Two ranks, bf16: the same bits and the same counts after every batch of trips."""
    with pytest.MonkeyPatch.context() as patch, turn():
        for name, value in gpu_environment.DEEPEP.items():
            patch.setenv(name, value)
        found = run_ranks(2, soak, deepep_world, SECONDS, timeout_s=SECONDS + 240)
    assert len({one["trips"] for one in found}) == 1, found
    assert all(one["dispatches"] == one["combines"] for one in found), found
    trips, seconds = found[0]["trips"], found[0]["seconds"]
    seen(
        f"{trips:,} round trips on two ranks in {seconds:.0f} s: same bits and counts throughout",
        trips=trips,
        microseconds=round(1e6 * seconds / trips, 1),
    )


@dataclass
class _Trips:
    """Round trips over one layer's tokens; the experts give back what they get."""

    world: World
    layer: Any
    count: Any = None

    def __call__(self) -> torch.Tensor:
        for _ in range(TRIPS):
            recv, self.count, handle = self.layer.dispatch()
            out = self.layer.combine(recv, handle)
        return out


def soak(group: dist.ProcessGroup, make_world: Any, seconds: float) -> dict[str, Any]:
    """On one rank; see :func:`test_round_trips`."""
    world: World = make_world(group, SIZES)
    tokens = [SIZES.capacity - 27 * rank for rank in range(world.ranks)]
    step = _Trips(world, world.layer(world.case(tokens, seed=7)))
    out, replay = world.captured(step)
    local = world.experts // world.ranks
    ids = torch.cat([each.flatten() for each in step.layer.case.topk_ids])
    first = world.rank * local
    expected = torch.bincount(ids[ids >= 0], minlength=world.experts)[first : first + local]
    weights = step.layer.topk_weights * (step.layer.ids >= 0)
    sent = (step.layer.x.float() * weights.sum(1, keepdim=True)).cpu()
    replay()
    reference, began, trips = out.clone(), time.monotonic(), 0
    close = (reference.float().cpu() - sent).abs().max() / sent.abs().max()
    assert close < 0.02, f"what came back is {close:.3f} away from what was sent"
    more = [True]
    while more[0]:
        for _ in range(REPLAYS):
            replay()
        trips += REPLAYS * TRIPS
        assert torch.equal(out, reference), f"other bits after {trips} round trips"
        assert torch.equal(step.count.cpu().long(), expected), f"counts after {trips} round trips"
        more = [time.monotonic() - began < seconds]
        dist.broadcast_object_list(more, 0, group=group)
    took = time.monotonic() - began
    stats = world.transport._stats
    world.destroy()
    return {
        "trips": trips,
        "seconds": took,
        "dispatches": stats.dispatches,
        "combines": stats.combines,
    }
