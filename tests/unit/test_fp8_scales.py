"""Where a checkpoint with one FP8 scale per output channel loses accuracy, and that ours does not.

One expert's two GEMMs on rows and weights with the outliers of a trained model: a few output
channels and a few hidden channels are many times the others. Errors are relative, against float64
on the weights as the checkpoint stores them, so that what is left is what a server adds.
"""

from dataclasses import replace
from functools import cache

import torch

from moe_plugin.kernels.experts_torch import (
    batched_experts_torch,
    dequantise_expert_torch,
    quantise_groups_torch,
)
from moe_plugin.kernels.formats import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR
from moe_plugin.kernels.weights import ExpertWeights
from tests.support.kernel_cases import (
    exact_activation,
    quantise_blocks,
    quantise_channels,
    quantise_tensors,
)

ROWS, HIDDEN, INTER = 64, 512, 256
MAKERS = {
    "channel": (FP8_CHANNEL, quantise_channels),
    "block": (FP8_BLOCK, quantise_blocks),
    "tensor": (FP8_TENSOR, quantise_tensors),
}


def with_outliers(channels: torch.Tensor, every: int, times: float) -> torch.Tensor:
    """One channel in `every` is `times` as large."""
    size = torch.where(torch.arange(channels.shape[-1]) % every == 5, times, 1.0)
    return channels * size


@cache
def checkpoint() -> tuple[torch.Tensor, ExpertWeights]:
    """Rows [1, ROWS, HIDDEN] float32, and one expert per channel."""
    torch.manual_seed(0)
    x = with_outliers(torch.randn(1, ROWS, HIDDEN), 160, 60.0)
    w13 = with_outliers(torch.randn(1, HIDDEN, 2 * INTER), 64, 400.0).transpose(1, 2) / HIDDEN
    w2 = with_outliers(torch.randn(1, INTER, HIDDEN), 64, 400.0).transpose(1, 2) / INTER
    (w13, s13), (w2, s2) = quantise_channels(w13), quantise_channels(w2)
    return x, ExpertWeights(w13, w2, s13, s2, FP8_CHANNEL)


def wanted(x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """The stored weights on unquantised rows, in float64."""
    w13, w2 = dequantise_expert_torch(weights, 0)
    both = x[0].double() @ w13.double().T
    return exact_activation(both, weights.activation) @ w2.double().T


def error_of(x: torch.Tensor, scale: torch.Tensor, weights: ExpertWeights) -> float:
    """Median over output channels, so that the large ones do not stand for all."""
    reference = wanted(checkpoint()[0], checkpoint()[1])
    counts = torch.tensor([ROWS], dtype=torch.int32)
    got = batched_experts_torch(x, scale, weights, counts, ROWS)[0].double()
    return float(((got - reference).norm(dim=0) / reference.norm(dim=0)).median())


def requantised(kind: str) -> ExpertWeights:
    """The checkpoint's expert with scales of another kind."""
    fmt, quantise = MAKERS[kind]
    w13, w2 = (w.unsqueeze(0) for w in dequantise_expert_torch(checkpoint()[1], 0))
    (w13, s13), (w2, s2) = quantise(w13), quantise(w2)
    return ExpertWeights(w13, w2, s13, s2, fmt)


def test_scales_per_channel_lose_nothing_where_blocks_and_tensors_do() -> None:
    """DeepGEMM's masked kernel, the host's way behind DeepEP, knows blocks alone."""
    rows = quantise_groups_torch(checkpoint()[0])
    error = {kind: error_of(*rows, requantised(kind)) for kind in MAKERS}
    ours = error_of(*rows, checkpoint()[1])
    assert ours <= 1.02 * error["channel"]  # quantised anew per channel they stay what they are
    assert error["block"] > 1.15 * ours
    assert error["tensor"] > 1.15 * ours


def test_scales_of_neighbours_would_be_far_off() -> None:
    """A channel's scale taken for its neighbours' answers wrongly, it does not lose a digit: not
    what costs five points of a hundred."""
    x, weights = checkpoint()
    assert weights.w13_scale is not None
    wrong = replace(weights, w13_scale=weights.w13_scale[:, :1].expand(-1, 2 * INTER))
    assert error_of(*quantise_groups_torch(x), wrong) > 0.5


def test_rows_per_128_channels_lose_less_than_rows_per_token() -> None:
    """What DeepEP delivers is finer than what such a checkpoint asks for."""
    x, weights = checkpoint()
    per_group = quantise_groups_torch(x)
    q, scale = quantise_groups_torch(x, HIDDEN)  # one per token, repeated for the layout
    per_token = q, scale.expand(-1, -1, HIDDEN // 128)
    assert error_of(*per_group, weights) < error_of(*per_token, weights)
