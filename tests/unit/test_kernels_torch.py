"""The plain-torch layer against float64, and its treatment of rows past the count."""

import pytest
import torch

from moe_plugin.kernels.experts_torch import (
    batched_experts_torch,
    dequantise_groups_torch,
    quantise_groups_torch,
)
from moe_plugin.kernels.formats import BF16, FORMATS, Format
from moe_plugin.kernels.weights import ExpertWeights
from tests.support.kernel_cases import ROUTINGS, exact, make_layer, zipf_counts


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("counts", [(0, 16, 5), (1, 0, 0), (16, 16, 16)], ids=str)
def test_matches_float64(fmt: Format, counts: tuple[int, ...]) -> None:
    layer = make_layer(16, 256, 112, counts, fmt, "cpu")
    out = batched_experts_torch(*layer.args(), 4, out=layer.poisoned_output())
    for e, want in exact(layer).items():
        m = counts[e]
        assert out[e, m:].isnan().all(), "a row past the count was written"
        if m:
            bound = 4e-2 if fmt.fp8_rows else 6e-3
            assert (out[e, :m].double() - want).norm() <= bound * want.norm()


def test_float32_is_exact_to_rounding() -> None:
    layer = make_layer(8, 128, 64, (8, 3), BF16, "cpu")
    weights = ExpertWeights(layer.weights.w13.float(), layer.weights.w2.float())
    out = batched_experts_torch(layer.x.float(), None, weights, layer.args()[-1], 1)
    for e, want in exact(layer).items():
        assert (out[e, : layer.counts[e]].double() - want).norm() <= 1e-5 * want.norm()


def test_quantisation_round_trip_keeps_ragged_tails() -> None:
    x = torch.randn(3, 200)
    q, scale = quantise_groups_torch(x)
    assert q.shape == x.shape
    assert scale.shape == (3, 2)
    error = (dequantise_groups_torch(q, scale) - x).abs()
    assert (error <= x.abs() / 16 + scale.repeat_interleave(128, -1)[:, :200] / 512).all()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings_share_a_total_up_to_the_capacity(routing: str) -> None:
    counts = ROUTINGS[routing](32, 8, 2048)
    assert sum(counts) == 256
    assert max(counts) <= 2048


def test_kernels_on_cpu_tensors_name_the_way_out() -> None:
    from moe_plugin.kernels.problem import device_of

    with pytest.raises(ValueError, match="_torch twin"):
        device_of(torch.empty(0))


def test_zipf_caps_the_hot_expert() -> None:
    counts = zipf_counts(4, 64, 100)
    assert counts[0] == 100
    assert sum(counts) == 256
