"""What a launch costs with other rows than it was chosen for: a decode graph's is replayed while
other DP groups prefill, and the one that is good for any rows is also replayed when none does."""

import os
from collections.abc import Sequence

import torch
from cases import model_shape
from kernel_cases import MODELS, ROUTINGS

from moe_plugin.kernels.formats import Format
from moe_plugin.kernels.launch import Launch, any_rows, entry_of_launch, pick_launch
from moe_plugin.kernels.problem import device_of
from moe_plugin.kernels.tuning.precompile import precompile
from moe_plugin.kernels.tuning.tune import Buffers, measure

CAPTURED_ROWS = (8, 16, 64)
LIVE_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def time_wide(
    index: int, weights: Format, rows: Sequence[int], routings: Sequence[str]
) -> list[dict[str, object]]:
    """Microseconds of a layer by the rows that its launch was chosen for, over the rows it gets."""
    shape = model_shape(index, weights, max(rows))
    buffers = Buffers.create(shape)
    device, cells = device_of(buffers.out), []
    launches: dict[int | str, Launch] = {
        each: pick_launch(shape, each, device) for each in (*CAPTURED_ROWS, *rows)
    }
    chosen: list[int | str] = [*CAPTURED_ROWS]
    if weights.fp8_rows:
        chosen.append("any")
        launches["any"] = any_rows(shape)
    precompile([(shape, launch) for launch in launches.values()], device, os.cpu_count() or 4)
    for live in rows:
        for routing in routings:
            counts = ROUTINGS[routing](shape.experts, live, shape.capacity)
            masked_m = torch.tensor(counts, dtype=torch.int32, device="cuda")
            us = {
                each: 1e6 * measure(buffers, [masked_m], launches[each])
                for each in dict.fromkeys((*chosen, live))
            }
            cells.append({
                "model": MODELS[index].name, "format": weights.name, "rows": live,
                "routing": routing, "us": us, "launch": entry_of_launch(launches[live]),
                "over": {c: us[c] / us[live] for c in chosen},
            })  # fmt: skip
    return cells
