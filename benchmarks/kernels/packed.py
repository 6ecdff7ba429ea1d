"""4-bit weights beside what else could compute them: stage `packed` of `bench.py`.

A cell has microseconds of the whole layer on the same rows: each packed format; our FP8 and bf16;
the least that dequantising to bf16 and our bf16 kernel can take, its two passes counted at this
run's ceiling; and at the end the host's two rivals: Marlin MoE, on tokens that give every expert as
many rows, and humming, on the layout that ours have. A few launches of every format are checked
first, and cells are tuned as long as `seconds` last.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cases import PACKED_MODELS, layer_bytes
from ceilings import copy_bytes_per_second, read_bytes_per_second
from fused_moe import publish_host_config, routed_tokens
from humming_rival import HummingLayers, check_humming, create_humming, import_host, time_humming
from kernel_cases import check, make_layer
from time_limit import time_limit

from moe_plugin.kernels.experts import batched_experts
from moe_plugin.kernels.formats import BF16, FP8_CHANNEL, Format
from moe_plugin.kernels.launch import Device, Launch, Shape, entry_of_launch, pick_launch, table_key
from moe_plugin.kernels.problem import device_of, lane_count
from moe_plugin.kernels.tuning.precompile import precompile
from moe_plugin.kernels.tuning.tune import (
    Buffers,
    candidate_launches,
    graph_seconds,
    save_table,
    tune_cell,
)

ROWS = (8, 1, 32, 64, 128, 256)  # the most telling first
OTHERS = (FP8_CHANNEL, BF16)
CAPACITY = 2048
CHECKED = (64, 1152, 176, (5, 0, 64, 17, 1))
CHECKED_ROWS = (1, 16, 32, 64, 128)
RIVAL_SECONDS = 100  # below what the watchdog allows: both compile when first called
TUNED_EXPERTS = 32  # what the shipped table has of these sizes


def shape_of(index: int, fmt: Format) -> Shape:
    """Layer of one model."""
    model = PACKED_MODELS[index]
    return Shape(model.experts, CAPACITY, model.hidden, model.inter, fmt)


def launch_of(shape: Shape, rows: int, device: Device) -> Launch:
    """The launch of the server, or the one measured for another number of experts."""
    if shape.format.packed:
        return pick_launch(shape, rows, device)
    return pick_launch(replace(shape, experts=TUNED_EXPERTS), rows, device)


def run_packed(
    out: Path, models: Sequence[int], formats: Sequence[Format], rows: Sequence[int],
    environment: dict[str, str], seconds: float, watchdog: Callable[[str], None],
) -> None:  # fmt: skip
    """Check, tune and measure; one line and one entry of the file as soon as a cell is there."""
    device = device_of(torch.empty(0, device="cuda"))
    broken = _compile(models, formats, rows, device, tune=seconds > 0)
    watchdog("check")
    result: dict[str, Any] = {"environment": environment, "checked": check_formats(formats)}
    watchdog("ceilings")
    copy, read = copy_bytes_per_second(), read_bytes_per_second()
    result |= {"copy_TBps": copy / 1e12, "read_TBps": read / 1e12, "cells": []}
    print(f"copy {copy / 1e12:.3f} TB/s, read {read / 1e12:.3f} TB/s", flush=True)
    launches: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    for index in models:
        buffers = {fmt: Buffers.create(shape_of(index, fmt)) for fmt in (*formats, *OTHERS)}
        for m in rows:
            watchdog(f"{PACKED_MODELS[index].name} {m}")
            times = {}
            for fmt, each in buffers.items():
                launch = launch_of(each.shape, m, device)
                if fmt.packed and time.monotonic() < deadline:
                    launch = tune_cell(each, m, skip=broken)
                    launches[table_key(each.shape, m)] = entry_of_launch(launch)
                    save_table(out / "packed-table.json", device.name, launches)
                times[fmt] = 1e6 * time_layer(each, m, launch), launch
            for cell in cells_of(index, m, times, copy, max(copy, read)):
                result["cells"].append(cell)
                print(line(cell), flush=True)
            (out / "kernels-packed.json").write_text(json.dumps(result, indent=1))
        buffers.clear()
    # Marlin first: after a kernel that faults nothing else runs in this process.
    for cells in (marlin_cells, humming_cells):
        for index in models:
            name = PACKED_MODELS[index].name
            for fmt in formats:
                mine = [c for c in result["cells"] if (c["model"], c["format"]) == (name, fmt.name)]
                for cell in cells(index, fmt, mine, watchdog):
                    print(rivals_line(cell), flush=True)
                    (out / "kernels-packed.json").write_text(json.dumps(result, indent=1))


def _compile(
    models: Sequence[int], formats: Sequence[Format], rows: Sequence[int], device: Device, *,
    tune: bool,
) -> set[Launch]:  # fmt: skip
    """Fill Triton's cache in processes; returns launches that do not compile."""
    began = time.monotonic()
    # Experts and capacity are not compiled in, the width of the vector of counts is.
    width = {lane_count(PACKED_MODELS[index].experts): index for index in models}
    jobs = []
    for shape in (shape_of(index, fmt) for index in width.values() for fmt in (*formats, *OTHERS)):
        jobs += [(shape, launch_of(shape, m, device)) for m in rows]
        if tune and shape.format.packed:
            jobs += [(shape, launch) for m in rows for launch in candidate_launches(shape, m)]
    for fmt in formats:
        small = Shape(len(CHECKED[3]), *CHECKED[:3], fmt)
        jobs += [(small, pick_launch(small, m, device)) for m in CHECKED_ROWS]
    failed = precompile(jobs, device, os.cpu_count() or 4)
    seconds = time.monotonic() - began
    print(f"{len(jobs)} launches compiled, {len(failed)} failed, {seconds:.0f} s", flush=True)
    print(*set(failed.values()), sep="\n", flush=True)
    return {launch for _, launch in failed}


def check_formats(formats: Sequence[Format]) -> dict[str, str]:
    """Small ragged layers against float64, twice: "" or what was wrong, by format."""
    found = {}
    for fmt in formats:
        layer = make_layer(*CHECKED, fmt, "cuda")
        found[fmt.name] = ""
        for rows in CHECKED_ROWS:
            try:
                first, again = layer.poisoned_output(), layer.poisoned_output()
                batched_experts(*layer.args(), rows, out=first)
                batched_experts(*layer.args(), rows, out=again)
                check(f"{fmt.name}, {rows} rows", first, layer)
                assert torch.equal(first.view(torch.int16), again.view(torch.int16)), "other bits"
            except Exception as error:  # what is wrong with one says nothing of the others
                found[fmt.name] = f"{type(error).__name__}: {error}"[:300]
        print(f"checked {fmt.name}: {found[fmt.name] or 'green'}", flush=True)
    return found


def time_layer(buffers: Buffers, rows: int, launch: Launch) -> float:
    """Seconds of the entry point that the server calls."""
    counts = torch.full((buffers.shape.experts,), rows, dtype=torch.int32, device="cuda")
    layers = buffers.layers

    def call(copy: int) -> Any:
        layer = layers[copy % len(layers)]
        return lambda: batched_experts(*layer, counts, rows, out=buffers.out, launch=launch)

    return graph_seconds([call(c) for c in range(4)])


def cells_of(
    index: int, rows: int, times: dict[Format, tuple[float, Launch]], copy: float, stream: float
) -> Iterator[dict[str, Any]]:
    """Cells of the packed formats at one number of rows, with their ratios."""
    for fmt, (us, launch) in times.items():
        if not fmt.packed:
            continue
        shape = shape_of(index, fmt)
        counts = (rows,) * shape.experts
        passes = sum(
            layer_bytes(replace(shape, format=each), (1,) * shape.experts) for each in (fmt, BF16)
        )
        size = layer_bytes(shape, counts)
        yield {
            "model": PACKED_MODELS[index].name, "format": fmt.name, "group": fmt.group_size,
            "rows": rows, "us": us, "bytes": size, "stream_fraction": size / us / 1e-6 / stream,
            "fp8_us": times[FP8_CHANNEL][0], "bf16_us": times[BF16][0],
            "dequantise_us": 1e6 * passes / copy + times[BF16][0],
            "launch": entry_of_launch(launch),
        }  # fmt: skip


def line(cell: dict[str, Any]) -> str:
    """For reading along."""
    us = cell["us"]
    return (
        f"{cell['model']:16} {cell['format']:14} m={cell['rows']:4} {us:8.1f} us "
        f"{100 * cell['stream_fraction']:5.1f}% stream  fp8 {cell['fp8_us']:8.1f} "
        f"x{cell['fp8_us'] / us:.2f}  bf16 {cell['bf16_us']:8.1f} x{cell['bf16_us'] / us:.2f}  "
        f"dequantise first > x{cell['dequantise_us'] / us:.2f}"
    )


def marlin_cells(
    index: int, fmt: Format, cells: Sequence[dict[str, Any]], watchdog: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Complete the cells of one model and format, yielding each."""
    for cell in cells:
        watchdog(f"marlin {cell['model']} {fmt.name} {cell['rows']}")
        cell |= time_marlin(index, cell["rows"], fmt)
        yield cell


def humming_cells(
    index: int, fmt: Format, cells: Sequence[dict[str, Any]], watchdog: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """Complete the cells of one model and format, yielding each."""
    humming: HummingLayers | str
    where = f"humming {PACKED_MODELS[index].name} {fmt.name}"
    watchdog(f"imports for {where}")
    try:
        import_host()
        watchdog(where)
        with time_limit(RIVAL_SECONDS):
            rows = [cell["rows"] for cell in cells]
            top_k = PACKED_MODELS[index].top_k
            humming = create_humming(shape_of(index, fmt), top_k, rows, RIVAL_SECONDS / 2)
    except Exception as error:  # another program's limits do not end this one
        humming = told(error)
    for cell in cells:
        watchdog(f"{where} {cell['rows']}")
        try:
            if isinstance(humming, str):
                cell["humming_error"] = humming
            else:
                with time_limit(RIVAL_SECONDS):
                    cell["humming_checked"] = check_humming(humming, cell["rows"])
                    cell |= time_humming(humming, cell["rows"])
        except Exception as error:
            cell["humming_error"] = told(error)
        yield cell


def told(error: Exception) -> str:
    """What a cell says instead of microseconds."""
    return f"{type(error).__name__}: {error}"[:200]


def rivals_line(cell: dict[str, Any]) -> str:
    """For reading along."""
    parts = [f"{cell['model']} {cell['format']} m={cell['rows']}: ours {cell['us']:.1f} us"]
    for key in ("marlin_us", "humming_us", "humming_live_us"):
        if key in cell:
            name = key.removesuffix("_us")
            parts.append(f"{name} {cell[key]:.1f} x{cell[key] / cell['us']:.2f}")
    parts += [
        cell[key] for key in ("marlin_error", "humming_checked", "humming_error") if cell.get(key)
    ]
    return "  ".join(parts)


def time_marlin(index: int, rows: int, fmt: Format) -> dict[str, Any]:
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
            return torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32, device="cuda")

        def scales(depth: int, width: int) -> torch.Tensor:
            size = (experts, depth // fmt.group_size, width)
            if fmt.code == "e2m1":  # the dtype tells it that the codes are MXFP4's
                exponents = torch.full(size, 121, dtype=torch.uint8, device="cuda")
                return exponents.view(torch.float8_e8m0fnu)
            return torch.full(size, 0.02, dtype=torch.bfloat16, device="cuda")

        x, weights, ids = routed
        gating = torch.zeros(x.shape[0], experts, device="cuda")
        given = (
            codes(hidden, 2 * inter), codes(inter, hidden), scales(hidden, 2 * inter),
            scales(inter, hidden),
        )  # fmt: skip

        def call() -> Any:
            return fused_marlin_moe(x, *given, gating, weights, ids, num_bits=4)

        with time_limit(RIVAL_SECONDS):
            return {"marlin_us": 1e6 * graph_seconds([call] * 4)}
    except Exception as error:  # another program's limits do not end this one
        return {"marlin_error": told(error)}
