"""The plain-torch layer against float64, and its treatment of rows past the count."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from moe_plugin.kernels.experts_torch import (
    activate_torch,
    batched_experts_torch,
    dequantise_groups_torch,
    quantise_groups_torch,
)
from moe_plugin.kernels.formats import BF16, FORMATS, SWIGLU, Activation, Format
from moe_plugin.kernels.weights import ExpertWeights
from tests.support.kernel_cases import ACTIVATIONS, ROUTINGS, exact, make_layer, zipf_counts


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


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_match_float64(name: str, fmt: Format) -> None:
    layer = make_layer(16, 256, 112, (5, 16), fmt, "cpu", activation=ACTIVATIONS[name])
    out = batched_experts_torch(*layer.args(), 4)
    plain = exact(replace(layer, weights=replace(layer.weights, activation=SWIGLU)))
    for e, want in exact(layer).items():
        bound = 4e-2 if fmt.fp8_rows else 6e-3
        error = (out[e, : layer.counts[e]].double() - want).norm() / want.norm()
        assert error <= bound
        if layer.weights.activation not in (SWIGLU, Activation(bias=True)):
            assert (plain[e] - want).norm() > 2 * bound * want.norm(), "the case tells nothing"


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        (Activation(limit=1.5), lambda g, u: silu(g.clamp(max=1.5)) * u.clamp(-1.5, 1.5)),
        (
            Activation("swiglu_clamped", limit=1.5),
            lambda g, u: silu(g).clamp(max=1.5) * u.clamp(-1.5, 1.5),
        ),
        (
            Activation(alpha=1.702, beta=1.0, limit=1.5),
            lambda g, u: (
                g.clamp(max=1.5)
                * torch.sigmoid(1.702 * g.clamp(max=1.5))
                * (u.clamp(-1.5, 1.5) + 1)
            ),
        ),
    ],
    ids=["limit before SiLU", "limit after SiLU", "alpha, beta, limit"],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_activation_formulas(
    activation: Activation, formula: Callable[..., torch.Tensor], interleaved: bool
) -> None:
    """As the host computes them, in its Triton fused MoE."""
    gate, up = 3 * torch.randn(2, 50, dtype=torch.float64)
    both = torch.stack((gate, up), -1).flatten() if interleaved else torch.cat((gate, up))
    got = activate_torch(both, replace(activation, interleaved=interleaved))
    torch.testing.assert_close(got, formula(gate, up))


@pytest.mark.parametrize(
    "bad",
    [{"limit": 0.0}, {"limit": -1.0}, {"kind": "swiglu_clamped"}, {"kind": "gelu"},
     {"kind": "swiglu_clamped", "limit": 7.0, "alpha": 1.702}],
    ids=str,
)  # fmt: skip
def test_activations_that_are_none(bad: dict) -> None:
    with pytest.raises(ValueError, match=r"got .*, allowed "):
        Activation(**bad)


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
