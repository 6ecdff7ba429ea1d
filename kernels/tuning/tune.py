"""Measure candidate launches on this GPU and write a table for `launch.pick_launch`.

Each GEMM is timed on its own for every candidate, then the layer for the best pairs, because the
second launch starts while the first one ends. A launch's time is its geometric mean over the
routings of `tuning_mixture`, with weights that are not in L2. A table is saved after every row
count, and cells that it already holds are skipped.
"""

import json
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
import triton

from ..expert_layer import layer_problems, weight_specs, workspace_tensors
from ..experts import run_layer
from ..formats import SCALE_BLOCK
from ..launch import (
    PACKED_STEP,
    Launch,
    Shape,
    Tiles,
    ceil_div,
    entry_of_launch,
    hopper_tiles,
    row_tile,
    sums_scaled,
    table_key,
)
from ..problem import device_of
from ..sm90.gemm_launch import run_hopper
from ..weights import ExpertWeights
from ..workspace import launch_workspace
from .precompile import precompile
from .routings import tuning_mixture

ROW_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
CACHE_BYTES = 512 << 20  # weights are rotated until they are several times any L2
LEAST_CALLS = 4
REPLAYS = 5  # after two that are not counted
COMPILING = 8  # processes
FINALISTS = 4
FEW_EXPERTS = 4
BURSTS = (1, 2)  # four were at most 0.5 % faster, and a coarser ring


def candidates(shape: Shape, expected_m: int) -> tuple[list[Tiles], list[Tiles]]:
    """Tiles worth measuring for this many rows, for each of the two GEMMs."""
    fmt, fp8 = shape.format, shape.format.fp8_rows
    if shape.format.packed:
        return packed_candidates(shape, expected_m)
    full = 128 if fp8 else 64
    exact = row_tile(expected_m)
    # block_n, block_m, block_m_busy, block_k, warps, per_sm, swap_ab, warp_groups
    shapes: list[tuple[int, int, int, int, int, int, bool, int]] = []
    if expected_m <= 64:
        shapes += [
            (64, exact, 64, full, 4, 1, True, 1), (64, exact, 64, full, 4, 2, True, 1),
            (128, exact, 64, full, 8, 1, True, 1),
        ]  # fmt: skip
        shapes += [] if fp8 else [(64, exact, 64, 128, 4, 1, True, 1)]
        shapes += [] if fp8 else [(64, exact, 128, full, 4, 1, True, 1)]
    if 16 <= expected_m <= 256:
        shapes += [
            (64, 64, 64, full, 4, 2, False, 1), (128, 64, 64, full, 4, 1, False, 1),
            (128, 64, 64, full, 8, 1, False, 1), (128, 64, 128, full, 8, 1, False, 1),
        ]  # fmt: skip
    if expected_m >= 64:
        shapes += [
            (128, 128, 128, full, 8, 1, False, 1), (128, 128, 128, full, 8, 1, False, 2),
            (64, 128, 128, full, 4, 2, False, 1), (64, 128, 128, full, 8, 1, False, 2),
        ]  # fmt: skip
    if expected_m >= 64 and not fp8:
        shapes += [(64, 256, 256, full, 8, 1, True, 1)]
    if shape.experts <= FEW_EXPERTS:
        # Their weight tiles leave multiprocessors idle unless rows are cut as well.
        short = [rows for rows in (16, 32) if rows < expected_m <= 256]
        shapes += [(64, rows, rows, full, 4, each, True, 1) for rows in short for each in (1, 2)]
    gate_up: list[Tiles] = []
    down: list[Tiles] = []
    for block_n, block_m, busy, depth, warps, per_sm, swap_ab, groups in shapes:
        tile = (block_n, block_m, busy)
        # The first GEMM's channels share a scale, so they are the depth of the second one.
        inner = block_n if fp8 else depth
        for burst in BURSTS if expected_m <= 128 else BURSTS[:1]:
            for found, step in ((gate_up, depth), (down, inner)):
                found.append(hopper_tiles(*tile, step, fmt, warps, per_sm, swap_ab, burst, groups))
    return list(dict.fromkeys(gate_up)), list(dict.fromkeys(down))


def packed_candidates(shape: Shape, expected_m: int) -> tuple[list[Tiles], list[Tiles]]:
    """The same where weights are dequantised in registers: they are the wide operand; a warp
    dequantises 16 or 32 channels of each tile."""
    exact, fmt = row_tile(expected_m), shape.format
    # block_n, block_m, block_m_busy, block_k, warps, per_sm
    tiles: list[tuple[int, int, int, int, int, int]] = []
    if expected_m <= 64:
        tiles += [(64, exact, 64, PACKED_STEP, 4, 2), (64, exact, 64, PACKED_STEP, 4, 1)]
    if expected_m <= 32:
        tiles += [(64, exact, 32, PACKED_STEP, 4, 2), (64, exact, 32, PACKED_STEP, 4, 1)]
    if expected_m <= 32 and fmt.group_size < PACKED_STEP:
        # Twice the channels on half the depth: each row is read half as often.
        tiles += [
            (128, exact, busy, PACKED_STEP // 2, 4, 2) for busy in sorted({max(16, exact), 32})
        ]
    if expected_m >= 32:
        tiles += [
            (64, min(exact, 64), 128, PACKED_STEP, 4, 1), (128, 64, 64, PACKED_STEP, 8, 1),
            (64, 64, 64, PACKED_STEP, 4, 2),
        ]  # fmt: skip
    if expected_m >= 64:
        tiles.append((64, 128, 128, PACKED_STEP, 4, 1))
    found = [
        hopper_tiles(n, m, busy, depth, fmt, warps, per_sm, burst=burst, scale_sums=sums)
        for n, m, busy, depth, warps, per_sm in tiles
        for burst in (BURSTS if expected_m <= 64 else BURSTS[:1])
        # With 32 channels a warp, sums beside their scales leave too few registers.
        for sums in ((False, True) if sums_scaled(fmt, busy) and n == 16 * warps else (False,))
    ]
    return list(dict.fromkeys(found)), list(dict.fromkeys(found))


def compatible(shape: Shape, gate_up: Tiles, down: Tiles) -> bool:
    """Whether the second GEMM steps through the scale groups that the first one quantised."""
    return not shape.format.fp8_rows or down.block_k == gate_up.block_n


def candidate_launches(shape: Shape, expected_m: int) -> list[Launch]:
    """Pairs in which every candidate occurs at least once."""
    firsts, seconds = candidates(shape, expected_m)
    pairs = [(next(a for a in firsts if compatible(shape, a, b)), b) for b in seconds]
    pairs += [(a, next(b for b in seconds if compatible(shape, a, b))) for a in firsts]
    return [Launch(True, a, b) for a, b in dict.fromkeys(pairs)]


@dataclass(frozen=True)
class Buffers:
    """Several copies of one layer, so that no launch finds its weights in L2."""

    shape: Shape
    layers: tuple[tuple[torch.Tensor, torch.Tensor | None, ExpertWeights], ...]
    out: torch.Tensor

    @staticmethod
    def create(shape: Shape, device: torch.device | str = "cuda") -> "Buffers":
        """Random weights and rows; every row is finite, live or not."""
        out = torch.empty(
            (shape.experts, shape.capacity, shape.hidden), dtype=torch.bfloat16, device=device
        )
        layers = tuple(random_layer(shape, device) for _ in range(copies_past_l2(shape)))
        return Buffers(shape, layers, out)

    def problems(
        self, copy: int, masked_m: torch.Tensor, launch: Launch, between: list[Any]
    ) -> tuple[Any, Any]:
        """Both GEMMs of one copy."""
        layer = self.layers[copy % len(self.layers)]
        return layer_problems(*layer, masked_m, between, self.out, launch.gate_up.block_n)


def expert_bytes(shape: Shape) -> int:
    """Of one expert's weights."""
    return 3 * shape.hidden * shape.inter * shape.format.weight_bits // 8


def copies_past_l2(shape: Shape) -> int:
    """Layers that take turns, so that no launch finds its weights in L2."""
    return ceil_div(CACHE_BYTES, shape.experts * expert_bytes(shape))


def random_layer(
    shape: Shape, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor | None, ExpertWeights]:
    """Rows, their scales, and weights."""
    dtype = torch.float8_e4m3fn if shape.format.fp8_rows else torch.bfloat16

    def dense(*size: int) -> torch.Tensor:
        result = torch.empty(size, dtype=dtype, device=device)
        for part in result:  # one expert at a time keeps the float32 copy small
            part.copy_(torch.randn(part.shape, device=device))
        return result

    experts, hidden, inter = shape.experts, shape.hidden, shape.inter
    x = dense(experts, shape.capacity, hidden)
    if shape.format.packed:
        return x, None, _random_packed(shape, device)
    w13, w2 = dense(experts, 2 * inter, hidden), dense(experts, hidden, inter)
    if not shape.format.fp8_rows:
        return x, None, ExpertWeights(w13, w2)

    def same(*size: int) -> torch.Tensor:
        return torch.full(size, 0.02, device=device)

    x_scale = same(experts, hidden // SCALE_BLOCK, shape.capacity).transpose(1, 2)
    wanted: Any = weight_specs(shape)
    w13_scale, w2_scale = same(*wanted.w13_scale.shape), same(*wanted.w2_scale.shape)
    return x, x_scale, ExpertWeights(w13, w2, w13_scale, w2_scale, shape.format)


def _random_packed(shape: Shape, device: torch.device | str) -> ExpertWeights:
    """Any code is a weight; every scale is the same."""
    wanted: Any = weight_specs(shape)

    def codes(spec: Any) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, spec.shape, dtype=torch.int32, device=device)

    def scales(spec: Any) -> torch.Tensor:
        pairs = torch.full((*spec.shape, 2), 0.02, dtype=torch.bfloat16, device=device)
        return pairs.view(torch.int32).squeeze(-1)

    return ExpertWeights(
        codes(wanted.w13), codes(wanted.w2), scales(wanted.w13_scale), scales(wanted.w2_scale),
        shape.format,
    )  # fmt: skip


def graph_seconds(calls: list[Callable[[], Any]]) -> float:
    """Median seconds of one call, of all of them captured into one graph."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for replay in range(REPLAYS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay > 1:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2] / len(calls) * 1e-3


def measure(
    buffers: Buffers, masks: Sequence[torch.Tensor], launch: Launch, which: str = "layer"
) -> float:
    """Seconds of one GEMM ("gate_up", "down") or of the layer under one launch, mean over the
    counts `masks`. No call finds its weights in L2, unless the same few experts are live in all."""
    device = device_of(buffers.out)
    layout = launch_workspace(buffers.shape, launch, device)
    between = workspace_tensors(layout, buffers.out.device)
    live = max(1, int((masks[0] > 0).sum()))
    most = len(masks) * len(buffers.layers)
    calls = max(LEAST_CALLS, min(most, ceil_div(CACHE_BYTES, live * expert_bytes(buffers.shape))))
    work: list[Callable[[], Any]] = []
    for call in range(calls):
        turn, mask = divmod(call, len(masks))
        gate_up, down = buffers.problems(turn + mask, masks[mask], launch, between)
        if which == "gate_up":
            work.append(partial(run_hopper, gate_up, launch.gate_up, device, chained=False))
        elif which == "down":
            work.append(partial(run_hopper, down, launch.down, device, chained=True))
        else:
            work.append(partial(run_layer, gate_up, down, launch, device))
    return graph_seconds(work)


def tune_cell(
    buffers: Buffers, rows: int, record: list[dict] | None = None, skip: Container[Launch] = ()
) -> Launch:
    """The best launch for `rows` live rows per expert; `record` collects every timing."""
    shape, gpu = buffers.shape, buffers.out.device
    mixture = [
        [torch.tensor(counts, dtype=torch.int32, device=gpu) for counts in routing]
        for routing in tuning_mixture(shape.experts, rows, shape.capacity)
    ]

    def timed(launch: Launch, which: str, /, **labels: Any) -> float:
        seconds = [measure(buffers, masks, launch, which) for masks in mixture]
        if record is not None:
            us = [1e6 * each for each in seconds]
            record.append(
                {"rows": rows, "which": which, "us": us[0], "skewed_us": us[1:], **labels}
            )
        return geometric_mean(seconds)

    timings: dict[str, dict[Tiles, float]] = {"gate_up": {}, "down": {}}
    for launch in candidate_launches(shape, rows):
        if launch in skip:
            continue
        for which, seen in timings.items():
            tiles = getattr(launch, which)
            if tiles not in seen:
                seen[tiles] = timed(launch, which, **asdict(tiles))
    first, second = timings["gate_up"], timings["down"]
    finalists = sorted(
        (Launch(True, a, b) for a in first for b in second if compatible(shape, a, b)),
        key=lambda pair: first[pair.gate_up] + second[pair.down],
    )[:FINALISTS]
    return min(finalists, key=lambda pair: timed(pair, "layer", launch=entry_of_launch(pair)))


def save_table(path: Path, device: str, launches: dict[str, dict]) -> None:
    """Write a table, one launch a line, sorted by shape and rows."""

    def order(key: str) -> tuple[str, int]:
        shape, rows = key.rsplit("-", 1)
        return shape, int(rows)

    head = {
        "device": device,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": date.today().isoformat(),
    }
    lines = [
        f"{json.dumps(key)}: {json.dumps(launches[key])}" for key in sorted(launches, key=order)
    ]
    text = json.dumps(head)[:-1] + ', "launches": {\n' + ",\n".join(lines) + "\n}}\n"
    path.write_text(text)


def tune(
    shapes: Iterable[Shape],
    path: Path,
    row_counts: Iterable[int] = ROW_COUNTS,
    progress: Callable[[int, int, str], None] | None = None,
) -> None:
    """Measure the missing cells of the table at `path`, saving after each.

    `progress(done, total, label)` is called before every cell.
    """
    launches = json.loads(path.read_text())["launches"] if path.is_file() else {}
    device = device_of(torch.empty(0, device="cuda"))
    cells = [(shape, m) for shape in shapes for m in row_counts if m <= shape.capacity]
    missing = [c for c in cells if table_key(*c) not in launches]
    jobs = [
        (shape, launch) for shape, rows in missing for launch in candidate_launches(shape, rows)
    ]
    failed = precompile(jobs, device, COMPILING) if jobs else {}
    buffers = None
    for done, (shape, rows) in enumerate(cells):
        key = table_key(shape, rows)
        if progress is not None:
            progress(done, len(cells), key)
        if key in launches:
            continue
        if buffers is None or buffers.shape != shape:
            buffers = None  # frees the previous shape's memory first
            buffers = Buffers.create(shape)
        launches[key] = entry_of_launch(
            tune_cell(buffers, rows, skip={launch for other, launch in failed if other == shape})
        )
        save_table(path, device.name, launches)
    if progress is not None:
        progress(len(cells), len(cells), "")
