"""The kernel benchmark without a GPU: what is counted, and when a bar is missed."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "kernels"
sys.path.append(str(FOLDER))

import humming_rival  # noqa: E402
import packed  # noqa: E402
from cases import MORE_TOKENS, TOKENS, layer_bytes, layer_flops, reachable_rows  # noqa: E402
from fused_moe import tokens_of  # noqa: E402
from time_limit import time_limit  # noqa: E402
from verdict import ceilings_sound, verdict  # noqa: E402

from moe_plugin.kernels.formats import BF16, INT4_G32, INT4_G128, MXFP4, Format  # noqa: E402
from moe_plugin.kernels.launch import Shape  # noqa: E402
from moe_plugin.kernels.packing import (  # noqa: E402
    dequantise_packed_torch,
    pack_codes,
    pack_scales,
)

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


def test_what_others_take_is_limited() -> None:
    with pytest.raises(TimeoutError, match="more than"), time_limit(0.05):
        time.sleep(10)
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # the clock stopped with the block


HUMMING_SHAPE = Shape(4, 64, 512, 256, INT4_G32)
HUMMING_FORMATS = (INT4_G32, INT4_G128, MXFP4)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What humming asks of the GPU."""
    pytest.importorskip("humming.layer")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("fmt", HUMMING_FORMATS, ids=lambda fmt: fmt.name)
def test_hummings_own_checks_take_the_tensors(fmt: Format) -> None:
    from humming.transform import check_and_pad_tensors

    shape = replace(HUMMING_SHAPE, format=fmt)
    layer = humming_rival.describe_layer(shape)
    for name, (n, k) in humming_rival.matrices(shape).items():
        tensors = humming_rival.random_tensors(shape, n, k, "cpu")
        padded = check_and_pad_tensors(layer.humming_metas[name], tensors)
        assert {key: each.shape for key, each in padded.items()} == {
            key: each.shape for key, each in tensors.items()
        }, "the host would pad what ours do not read"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("fmt", HUMMING_FORMATS, ids=lambda fmt: fmt.name)
def test_its_codes_are_ours(fmt: Format) -> None:
    """The same codes and scales, in both orders, are the same weights."""
    tensors = humming_rival.random_tensors(replace(HUMMING_SHAPE, format=fmt), 32, 256, "cpu")
    one = {key: value[0] for key, value in tensors.items()}
    words = one["weight"].numpy().view("uint8")  # two codes in a byte, the first lowest
    codes = torch.tensor([[c for byte in row for c in (byte & 15, byte >> 4)] for row in words])
    scale = one["weight_scale"]
    scale = scale.view(torch.uint8) if fmt is MXFP4 else scale
    ours = dequantise_packed_torch(pack_codes(codes, fmt), pack_scales(scale, 256, fmt), 256, fmt)
    assert torch.equal(humming_rival.dequantise_humming(one, fmt), ours)


@pytest.mark.usefixtures("hopper")
def test_launches_are_those_of_the_hosts_table() -> None:
    pytest.importorskip("sglang.srt.layers.moe.moe_runner.humming")
    from humming.config import GemmType
    from humming.layer import HummingMethod

    core = humming_rival.make_core(HUMMING_SHAPE, 2)
    whole = HummingMethod.get_default_tuning_configs(
        core.layer, gemm_type=GemmType("grouped_masked"), sublayer_name="w2"
    )
    assert len(whole) > 2
    blocks = []
    for rows in (1, 64):  # a narrowed table is widened again
        [(above, up_to, entry)] = humming_rival.launch_configs(core, rows)["w2_tuning_config"]
        assert (above, up_to) == (0, 1 << 30)
        assert entry in [config for low, high, config in whole if low < rows * 4 <= high]
        blocks.append(entry["block_shape"][0])
    assert blocks[0] < blocks[1]
    assert len(humming_rival.kernel_configs(core, (1, 64, 64))) == 4


def test_a_cell_says_why_it_has_no_humming(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'humming'")

    monkeypatch.setattr(packed, "import_host", missing)
    cells = [{"model": "m", "format": "int4_g32", "rows": 8, "us": 2.0, "marlin_us": 3.0}]
    [found] = packed.humming_cells(0, INT4_G32, cells, lambda _: None)
    assert found is cells[0]
    assert "No module named 'humming'" in found["humming_error"]
    line = packed.rivals_line(found)
    assert "marlin 3.0 x1.50" in line
    assert "No module named 'humming'" in line
