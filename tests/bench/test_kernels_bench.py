"""The kernel benchmark without a GPU: what is counted, and when a bar is missed."""

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "kernels"
sys.path.append(str(FOLDER))

from cases import MORE_TOKENS, TOKENS, layer_bytes, layer_flops, reachable_rows  # noqa: E402
from fused_moe import tokens_of  # noqa: E402
from verdict import ceilings_sound, verdict  # noqa: E402

from moe_plugin.kernels.formats import BF16  # noqa: E402
from moe_plugin.kernels.launch import Shape  # noqa: E402

CEILINGS = {"copy_TBps": 2.8, "read_TBps": 3.0}


def cell(**more: Any) -> dict[str, Any]:
    """A cell that passes every bar."""
    return {
        "model": "DeepSeek-V3 EP8", "dtype": "fp8", "format": "fp8_block", "rows": 8,
        "routing": "uniform",
        "reachable": True, "us": 100.0, "deepgemm_us": 120.0, "stream_fraction": 0.96,
        "over_floor": 1.1, "read_us": 98.0,
    } | more  # fmt: skip


@pytest.mark.parametrize(
    ("worse", "name"),
    [
        ({"stream_fraction": 0.89}, "share of the stream"),
        ({"deepgemm_us": 104.0}, "over DeepGEMM, rows <= 64"),
        ({"rows": 128, "deepgemm_us": 99.0}, "over DeepGEMM, 128 rows"),
        ({"rows": 256, "deepgemm_us": 74.0}, "over DeepGEMM, rows >= 256"),
        ({"routing": "one-hot", "over_floor": 1.31}, "one-hot"),
    ],
)
def test_one_bad_cell_misses_its_bar_alone(worse: dict[str, Any], name: str) -> None:
    good = [cell(), cell(rows=128), cell(rows=256), cell(routing="one-hot")]
    assert all(bar.ok for bar in verdict(good))
    missed = [bar for bar in verdict([*good, cell(**worse)]) if not bar.ok]
    assert [name in bar.name for bar in missed] == [True], missed


def test_cells_that_no_batch_reaches_are_not_judged() -> None:
    assert not verdict([cell(reachable=False, stream_fraction=0.1)])


def test_a_cell_without_the_baseline_is_judged_by_the_rest() -> None:
    without = cell()
    del without["deepgemm_us"]
    assert ["stream" in bar.name for bar in verdict([without])] == [True]


def test_the_stream_bar_tells_what_a_plain_read_takes() -> None:
    assert "0.980 of a plain read" in str(verdict([cell()])[0])


def test_a_slow_h100_voids_the_run() -> None:
    assert ceilings_sound("NVIDIA H100 80GB HBM3", CEILINGS)
    assert not ceilings_sound("NVIDIA H100 80GB HBM3", CEILINGS | {"read_TBps": 2.8})
    assert ceilings_sound("NVIDIA H100 PCIe", {"copy_TBps": 1.7, "read_TBps": 1.8})


def test_means_that_a_batch_can_have() -> None:
    deepseek, spread = 0, 3
    assert reachable_rows(deepseek, TOKENS) == 64  # 8 ranks x 256 tokens x top-8 / 256 experts
    assert reachable_rows(deepseek, MORE_TOKENS) == 256
    assert reachable_rows(spread, TOKENS) == 1024  # every token of 128 ranks


def test_bytes_count_live_experts_and_rows_once() -> None:
    shape = Shape(experts=4, capacity=64, hidden=256, inter=128, format=BF16)
    weights = 3 * 256 * 128 * 2
    row = (256 + 256 + 2 * 128) * 2
    assert layer_bytes(shape, (0, 3, 0, 1)) == 2 * weights + 4 * row
    assert layer_flops(shape, (0, 3, 0, 1)) == 4 * 2 * 3 * 256 * 128


def test_tokens_of_the_unbatched_baseline() -> None:
    assert tokens_of(experts=32, rows=8, top_k=8) == 32
    assert tokens_of(experts=1, rows=7, top_k=2) == 7  # one local expert: each token visits it once
    assert tokens_of(experts=3, rows=1, top_k=2) is None
