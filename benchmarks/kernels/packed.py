"""4-bit weights beside what else could compute them: stage `packed` of `bench.py`.

Each cell is tuned first, within a time limit, so that one visit to a GPU gives the table of tiles
and what they reach. A cell has microseconds of the whole layer on the same rows: this format; our
FP8 and bf16; the least that dequantising to bf16 and our bf16 kernel can take, the copy counted at
this run's ceiling; and the host's Marlin MoE, on tokens that give every expert as many rows.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import MORE_TOKENS, PACKED_MODELS, TOKENS, layer_bytes
from ceilings import copy_bytes_per_second, read_bytes_per_second
from fused_moe import publish_host_config, routed_tokens

from moe_plugin.kernels.experts import batched_experts
from moe_plugin.kernels.formats import BF16, FP8_CHANNEL, Format
from moe_plugin.kernels.launch import (
    Launch,
    Shape,
    encode_launch,
    heuristic,
    pick_launch,
    table_key,
)
from moe_plugin.kernels.problem import device_of, lane_count
from moe_plugin.kernels.tuning.precompile import precompile
from moe_plugin.kernels.tuning.tune import (
    Buffers,
    candidate_launches,
    graph_seconds,
    measure,
    save_table,
    tune_cell,
)

ROWS = (1, 8, 32, 64, 128, 256)
OTHERS = (FP8_CHANNEL, BF16)


def shape_of(index: int, fmt: Format, rows: int) -> Shape:
    """Layer of one model; many rows need more tokens per rank."""
    model = PACKED_MODELS[index]
    tokens = TOKENS if rows <= TOKENS * model.top_k // model.experts else MORE_TOKENS
    return Shape(model.experts, tokens * model.ranks, model.hidden, model.inter, fmt)


def run_packed(
    out: Path, models: Sequence[int], formats: Sequence[Format], rows: Sequence[int],
    environment: dict[str, str], seconds: float, watchdog: Callable[[str], None],
) -> None:  # fmt: skip
    """Tune and measure; after `seconds` what is left takes the heuristic's tiles."""
    began = time.monotonic()
    device = device_of(torch.empty(0, device="cuda"))
    # Experts and capacity are not compiled in, the width of the vector of counts is.
    width = {lane_count(PACKED_MODELS[index].experts): index for index in models}
    jobs = [
        (shape, launch)
        for index in width.values()
        for fmt in formats
        for m in rows
        for shape in [shape_of(index, fmt, m)]
        for launch in [*candidate_launches(shape, m), heuristic(shape, m, device)]
    ]
    failed = precompile(jobs, device, os.cpu_count() or 4)
    broken = {launch for _, launch in failed}
    print(f"{len(jobs)} launches compiled, {len(failed)} failed, "
          f"{time.monotonic() - began:.0f} s", *set(failed.values()), flush=True)  # fmt: skip
    watchdog("ceilings")
    copy, read = copy_bytes_per_second(), read_bytes_per_second()
    result: dict[str, Any] = {
        "environment": environment, "copy_TBps": copy / 1e12, "read_TBps": read / 1e12, "cells": [],
    }  # fmt: skip
    print(f"copy {copy / 1e12:.3f} TB/s, read {read / 1e12:.3f} TB/s", flush=True)
    launches: dict[str, Any] = {}
    for index in models:
        cells: dict[int, dict[str, Any]] = {m: {} for m in rows}
        for fmt in (*formats, *OTHERS):
            _time_format(index, fmt, cells, broken, began + seconds, launches, watchdog)
            save_table(out / "packed-table.json", device.name, launches)
        for m in rows:
            watchdog(f"marlin {PACKED_MODELS[index].name} {m}")
            cells[m]["marlin"] = time_marlin(index, m)
            for fmt in formats:
                cell = report(index, fmt, m, cells[m], copy, max(copy, read))
                result["cells"].append(cell)
                print(line(cell), flush=True)
        (out / "kernels-packed.json").write_text(json.dumps(result, indent=1))


def _time_format(
    index: int, fmt: Format, cells: dict[int, dict[str, Any]], broken: set[Launch],
    deadline: float, launches: dict[str, Any], watchdog: Callable[[str], None],
) -> None:  # fmt: skip
    buffers = None
    for m in cells:
        shape = shape_of(index, fmt, m)
        if buffers is None or buffers.shape != shape:
            buffers = None  # frees the previous shape's memory first
            buffers = Buffers.create(shape)
        watchdog(f"{PACKED_MODELS[index].name} {fmt.name} {m}")
        device = device_of(buffers.out)
        # Tiles were measured for 32 experts of these sizes.
        launch = pick_launch(replace(shape, experts=32), m, device)
        if fmt.packed and time.monotonic() < deadline:
            record: list[dict] = []
            launch = tune_cell(buffers, m, record, broken)
            launches[table_key(shape, m)] = encode_launch(launch)
            counts = torch.full((shape.experts,), m, dtype=torch.int32, device="cuda")
            plain = heuristic(shape, m, device)
            cells[m][f"{fmt.name} tuning"] = record
            cells[m][f"{fmt.name} heuristic"] = 1e6 * measure(buffers, counts, plain)
        cells[m][fmt.name] = 1e6 * time_layer(buffers, m, launch)
        cells[m][f"{fmt.name} launch"] = encode_launch(launch)


def time_layer(buffers: Buffers, rows: int, launch: Launch) -> float:
    """Seconds of the entry point that the server calls."""
    counts = torch.full((buffers.shape.experts,), rows, dtype=torch.int32, device="cuda")
    layers = buffers.layers

    def call(copy: int) -> Any:
        layer = layers[copy % len(layers)]
        return lambda: batched_experts(*layer, counts, rows, out=buffers.out, launch=launch)

    return graph_seconds([call(c) for c in range(8)])


def report(
    index: int, fmt: Format, rows: int, cell: dict[str, Any], copy: float, stream: float
) -> dict[str, Any]:
    """One cell with its ratios."""
    shape = shape_of(index, fmt, rows)
    counts = (rows,) * shape.experts
    size, us = layer_bytes(shape, counts), cell[fmt.name]
    bf16 = replace(shape, format=BF16)
    none = (1,) * shape.experts
    passes = (layer_bytes(shape, none) + layer_bytes(bf16, none)) / copy
    return {
        "model": PACKED_MODELS[index].name, "format": fmt.name, "rows": rows, "us": us,
        "bytes": size, "stream_fraction": size / us / 1e-6 / stream,
        "fp8_us": cell[FP8_CHANNEL.name], "bf16_us": cell[BF16.name],
        "dequantise_us": 1e6 * passes + cell[BF16.name],
        "heuristic_us": cell.get(f"{fmt.name} heuristic"), "launch": cell[f"{fmt.name} launch"],
        "timings": cell.get(f"{fmt.name} tuning"), **cell["marlin"],
    }  # fmt: skip


def line(cell: dict[str, Any]) -> str:
    """For reading along."""
    us = cell["us"]
    marlin = cell.get("marlin_us")
    return (
        f"{cell['model']:16} {cell['format']:14} m={cell['rows']:4} {us:8.1f} us "
        f"{100 * cell['stream_fraction']:5.1f}% stream  fp8 {cell['fp8_us']:8.1f} "
        f"x{cell['fp8_us'] / us:.2f}  bf16 {cell['bf16_us']:8.1f} x{cell['bf16_us'] / us:.2f}  "
        f"dequantise first > x{cell['dequantise_us'] / us:.2f}  marlin "
        f"{f'x{marlin / us:.2f}' if marlin else cell.get('marlin_error', 'none')}  heuristic "
        f"{cell['heuristic_us'] or 0:.1f}  {cell['launch']['gate_up']} {cell['launch']['down']}"
    )


def time_marlin(index: int, rows: int, group: int = 32) -> dict[str, Any]:
    """The host's Marlin MoE, sums over top-k included, on random weights in its layout."""
    model = PACKED_MODELS[index]
    routed = routed_tokens(model.experts, rows, model.top_k, model.hidden)
    if routed is None:
        return {}
    experts, hidden, inter = model.experts, model.hidden, model.inter
    try:
        publish_host_config()
        from sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe import fused_marlin_moe

        def codes(depth: int, width: int) -> torch.Tensor:
            size = (experts, depth // 16, 2 * width)
            return torch.randint(-(2**31), 2**31, size, dtype=torch.int32, device="cuda")

        def scales(depth: int, width: int) -> torch.Tensor:
            size = (experts, depth // group, width)
            return torch.full(size, 0.02, dtype=torch.bfloat16, device="cuda")

        x, weights, ids = routed
        gating = torch.zeros(x.shape[0], experts, device="cuda")
        given = (
            codes(hidden, 2 * inter), codes(inter, hidden), scales(hidden, 2 * inter),
            scales(inter, hidden),
        )  # fmt: skip

        def call() -> Any:
            return fused_marlin_moe(x, *given, gating, weights, ids, num_bits=4)

        return {"marlin_us": 1e6 * graph_seconds([call] * 4)}
    except Exception as error:  # another program's limits do not end this one
        return {"marlin_error": f"{type(error).__name__}: {error}"[:200]}
