"""The launch choice is a pure function: tiles that fit, groups that match, tables that win."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moe_plugin.kernels import launch as launches
from moe_plugin.kernels.expert_layer import (
    layer_specs,
    region_spec,
    regions,
    workspace_tensors,
)
from moe_plugin.kernels.formats import BF16, FORMATS, FP8_BLOCK, Format
from moe_plugin.kernels.launch import (
    SM90_SHARED_BYTES,
    Device,
    Launch,
    Shape,
    Tiles,
    any_rows,
    entry_of_launch,
    heuristic,
    launch_from_entry,
    pick_launch,
    row_tile,
    table_key,
)
from moe_plugin.kernels.problem import tma_ready
from moe_plugin.kernels.tuning import tune
from moe_plugin.kernels.workspace import launch_workspace, workspace_bytes, workspace_layout
from tests.support.kernel_cases import MODELS, Model

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 132)
A100 = Device("NVIDIA A100-SXM4-80GB", (8, 0), 108)
B200 = Device("NVIDIA B200", (10, 0), 148)
ROWS = (1, 4, 8, 9, 16, 32, 64, 65, 128, 256, 512, 1024, 5000)
SHAPES = [
    Shape(m.experts, 256 * m.ranks, m.hidden, m.inter, fmt)
    for m in MODELS
    for fmt in FORMATS.values()
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_tiles_fit_the_multiprocessor(shape: Shape, rows: int) -> None:
    launch = heuristic(shape, rows, H100)
    assert launch.hopper
    for tiles in (launch.gate_up, launch.down):
        fmt = shape.format
        bits = 2 * tiles.block_n * fmt.weight_bits + tiles.block_m_busy * fmt.row_bits
        stage = bits * tiles.block_k // 8
        assert tiles.stages >= 2
        assert tiles.stages * stage * tiles.per_sm < SM90_SHARED_BYTES
        assert tiles.block_m_busy >= tiles.block_m


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.format.fp8_rows], ids=str)
def test_second_gemm_steps_through_the_groups_of_the_first(shape: Shape, rows: int) -> None:
    for launch in (heuristic(shape, rows, H100), *tune.candidate_launches(shape, rows)):
        assert launch.gate_up.block_k == 128, "dispatch delivers one scale per 128 channels"
        assert launch.down.block_k == launch.gate_up.block_n


@pytest.mark.parametrize("device", [A100, B200, replace(H100, capability=(8, 9))], ids=str)
def test_other_gpus_take_the_portable_kernels(device: Device) -> None:
    assert not heuristic(SHAPES[0], 8, device).hopper


def test_few_rows_cost_few() -> None:
    assert [row_tile(m) for m in (1, 8, 9, 64, 65, 4096)] == [8, 8, 16, 64, 128, 128]
    assert heuristic(SHAPES[0], 1, H100).gate_up.swap_ab
    assert not heuristic(SHAPES[0], 512, H100).gate_up.swap_ab


def test_capacity_changes_no_tile() -> None:
    shape = SHAPES[0]
    larger = replace(shape, capacity=4 * shape.capacity)
    assert pick_launch(shape, 8, H100) == pick_launch(larger, 8, H100)


@pytest.mark.parametrize("device", [H100, replace(H100, name="NVIDIA H200")], ids=str)
@pytest.mark.parametrize("model", MODELS, ids=str)
def test_rows_that_may_come_besides(model: Model, device: Device) -> None:
    """Many have a launch of their own in FP8, for few experts and with a table as well; fewer avoid
    the launch for the fewest rows."""
    for fmt in (FP8_BLOCK, BF16):
        shape = Shape(model.experts, 8192, model.hidden, model.inter, fmt)
        for rows in (1, 8, 64, 128):
            usual = pick_launch(shape, max(rows, 16), device)
            assert pick_launch(shape, rows, device, 127) == usual
            beside = pick_launch(shape, rows, device, 128)
            assert beside == (any_rows(shape) if fmt is FP8_BLOCK else usual)
        assert pick_launch(shape, 512, device, 4096) == pick_launch(shape, 512, device)
    shape = replace(shape, format=FP8_BLOCK)
    assert not pick_launch(shape, 8, replace(device, name="L40S", capability=(8, 9)), 4096).hopper


@pytest.mark.parametrize("capacity", [17, 66, 2049])
def test_row_scales_that_the_copy_engine_cannot_reach_take_the_portable_kernels(
    capacity: int,
) -> None:
    """It reads from multiples of 16 bytes, and the scales of one step begin `capacity` later."""
    for fmt in FORMATS.values():
        launch = pick_launch(Shape(32, capacity, 7168, 2048, fmt), 8, H100)
        assert launch.hopper == (not fmt.fp8_rows)
    assert pick_launch(Shape(32, 68, 7168, 2048, FP8_BLOCK), 8, H100).hopper


def test_table_wins_over_heuristic(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = Tiles(64, 8, 8, 64, 5)
    entry = {table_key(SHAPES[0], 8): entry_of_launch(Launch(True, tiles, tiles))}
    monkeypatch.setattr(launches, "tuned_table", lambda name: entry if name == H100.name else {})
    assert pick_launch(SHAPES[0], 8, H100) == Launch(True, tiles, tiles)
    assert pick_launch(SHAPES[0], 8, A100) == heuristic(SHAPES[0], 8, A100)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 64, 512])
def test_launch_survives_json(shape: Shape, rows: int) -> None:
    launch = heuristic(shape, rows, H100)
    assert launch_from_entry(json.loads(json.dumps(entry_of_launch(launch)))) == launch


def test_shipped_tables_decode() -> None:
    paths = list((Path(launches.__file__).parent / "tuned").glob("*.json"))
    assert paths
    for path in paths:
        for entry in json.loads(path.read_text())["launches"].values():
            launch_from_entry(entry)


@pytest.mark.parametrize("experts", [1, 2, 3])
@pytest.mark.parametrize("capacity", [16, 37])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_workspace_bytes_bound_what_is_allocated(experts: int, capacity: int, fmt: Format) -> None:
    shape = Shape(experts, capacity, 4096, 176, fmt)
    totals = [launch_workspace(shape, heuristic(shape, rows, H100), H100).total for rows in ROWS]
    assert max(totals) == workspace_bytes(shape), "the most is the bytes of some launch"


@pytest.mark.parametrize("capacity", [16, 37])
@pytest.mark.parametrize("scale_group", [None, 64, 128])
def test_workspace_tensors_lie_side_by_side_as_their_stand_ins_say(
    scale_group: int | None, capacity: int
) -> None:
    layout = workspace_layout(Shape(3, capacity, 256, 176, BF16), scale_group)
    tensors, end = workspace_tensors(layout, "cpu"), 0
    base = tensors[0].data_ptr()
    for tensor, region in zip(tensors, regions(layout), strict=True):
        spec = region_spec(region)
        if tensor is None:
            assert spec is None
            continue
        assert tuple(tensor.shape) == spec.shape
        assert tensor.stride() == spec.stride()
        assert tensor.dtype == spec.dtype
        assert tensor.data_ptr() == base + end
        assert end % 16 == 0
        end += tensor.numel() * tensor.element_size()
    assert end == layout.total


@pytest.mark.parametrize(("rows", "routings"), [(8, 3), (64, 2)])
def test_tuner_takes_the_best_mean_over_its_routings(
    rows: int, routings: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch that is best under uniform routing alone loses to a good one under all."""
    shape, record = SHAPES[0], []
    narrow, wide = candidates = tune.candidate_launches(shape, rows)[:2]
    seconds = {narrow: [1.0, 3.0, 1.0], wide: [1.1, 2.0, 1.1]}
    asked: dict[Launch, int] = dict.fromkeys(candidates, 0)

    def measure(_buffers: object, _masks: object, launch: Launch, which: str) -> float:
        if which != "layer":
            return 1.0
        asked[launch] += 1
        return seconds[launch][asked[launch] - 1]

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "candidate_launches", lambda *_: candidates)
    monkeypatch.setattr(tune, "compatible", lambda _, a, b: Launch(True, a, b) in candidates)
    fake = type("Fake", (), {"shape": shape, "out": tune.torch.empty(0)})()
    assert tune.tune_cell(fake, rows, record) == wide
    assert set(asked.values()) == {routings}
    layers = [entry for entry in record if entry["which"] == "layer"]
    assert [len(entry["skewed_us"]) for entry in layers] == [routings - 1] * 2


def test_tuner_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, shape, measured = tmp_path / "table.json", SHAPES[1], []
    tiles = Tiles(64, 8, 8, 64, 5)

    def cell(_buffers: object, rows: int, **_: object) -> Launch:
        measured.append(rows)
        if rows == 64:
            raise KeyboardInterrupt
        return Launch(True, tiles, tiles)

    monkeypatch.setattr(tune, "tune_cell", cell)
    monkeypatch.setattr(tune, "precompile", lambda *_: {})
    monkeypatch.setattr(tune, "device_of", lambda _: H100)
    monkeypatch.setattr(tune.torch, "empty", lambda *_, **__: None)
    fake = type("Fake", (), {"shape": shape})()
    monkeypatch.setattr(tune.Buffers, "create", staticmethod(lambda _: fake))
    with pytest.raises(KeyboardInterrupt):
        tune.tune([shape], path, (8, 16, 64))
    seen: list[tuple[int, int]] = []
    measured.clear()
    tune.tune([shape], path, (8, 16, 32), lambda done, total, _: seen.append((done, total)))
    assert measured == [32], "cells that the table holds are not measured again"
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert set(json.loads(path.read_text())["launches"]) == {
        table_key(shape, rows) for rows in (8, 16, 32)
    }


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@pytest.mark.parametrize("capacity", [1, 2, 4, 17, 64])
def test_capacities_that_the_copy_engine_cannot_take_go_elsewhere(
    fmt: Format, capacity: int
) -> None:
    """One row would become a constant of the kernel; the scales of FP8 rows need whole fours."""
    shape = Shape(4, capacity, 512, 256, fmt)
    device = Device("NVIDIA H100 80GB HBM3", (9, 0), 132)
    gate_up, _ = layer_specs(shape, pick_launch(shape, 1, device), device)
    assert tma_ready(gate_up) is (capacity > 1 and (not fmt.fp8_rows or capacity % 4 == 0))
