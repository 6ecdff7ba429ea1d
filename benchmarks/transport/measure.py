"""What one rank measures: the transport at every batch size, and a decode layer's parts."""

from __future__ import annotations

import faulthandler
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch.distributed as dist
from breakdown import PARTS, segments, trace
from pieces import Pieces, device_of_rank
from shapes import Shape
from timing import Step, captured, seconds_of

STEP_LIMIT_S = 90.0  # a rank that takes longer at one batch size prints where it is and ends
TRACED = 20


@dataclass(frozen=True)
class Options:
    """How it is measured.

    Attributes:
        cpu: plain calls on CPU tensors, to test the benchmark itself.
        transport: ``deepep`` or ``torch``.
        calls: steps in one captured graph, or in one eager round.
        rounds: samples of each figure; the median counts.
    """

    cpu: bool
    transport: str
    calls: int
    rounds: int


def measure(group: dist.ProcessGroup, shape: Shape, options: Options) -> dict[str, Any]:
    """Microseconds by batch size on this rank."""
    device = device_of_rank(group.rank(), group.size(), options.cpu)
    faulthandler.dump_traceback_later(STEP_LIMIT_S, exit=True)
    pieces = Pieces(group, shape, options.transport, device)
    rows = []
    for tokens in shape.tokens():
        faulthandler.dump_traceback_later(STEP_LIMIT_S, exit=True)
        print(f"rank {group.rank()}: {shape.name}, {tokens} tokens", flush=True)
        pieces.load(tokens)
        rows.append({"tokens": tokens} | _row(pieces, options))
    pieces.destroy()
    faulthandler.cancel_dump_traceback_later()
    return {"rows": rows}


def _row(pieces: Pieces, options: Options) -> dict[str, Any]:
    # Each step makes an even number of low-latency calls, and is that many of what it measures.
    steps: dict[str, tuple[Step, int]] = {
        "dispatch": (_twice(pieces.dispatch), 2),
        "combine": (_twice(pieces.combine), 2),
        "experts": (pieces.experts, 1),
        "layer": (pieces.layer, 1),
    }
    row: dict[str, Any] = {}
    for mode in ("eager",) if options.cpu or options.transport == "torch" else ("eager", "graph"):
        row[mode] = {
            name: 1e6
            / number
            * seconds_of(
                step,
                pieces.group,
                on_gpu=not options.cpu,
                graph=mode == "graph",
                calls=options.calls,
                rounds=options.rounds,
            )
            for name, (step, number) in steps.items()
        }
    if "graph" in row:
        row["kernels"] = _kernels(pieces)
    return row


def _twice(step: Step) -> Callable[[], None]:
    def both() -> None:
        step()
        step()

    return both


def _kernels(pieces: Pieces) -> dict[str, float] | str:
    """Mean us of each part of a replayed layer, or why there is no trace."""
    replay = captured(pieces.layer, 1)
    dist.barrier(pieces.group)
    found = segments(trace(replay, TRACED))[1:]  # ranks start the first one apart
    if len(found) != TRACED - 1:
        return f"the trace has {len(found) + 1} layers, not {TRACED}"
    return {part: mean(layer[part] for layer in found) for part in PARTS}
