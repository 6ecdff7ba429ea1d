"""Inputs, exact references and the error bound of the expert kernels.

Shared by the tests and the benchmarks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch

from moe_plugin.kernels.experts_torch import (
    batched_experts_torch,
    dequantise_expert_torch,
    dequantise_groups_torch,
    quantise_groups_torch,
)
from moe_plugin.kernels.formats import SCALE_BLOCK, Format
from moe_plugin.kernels.tuning.tune import zipf_counts
from moe_plugin.kernels.weights import ExpertWeights

# Kernel and twin round in the same places; what differs is the order of summation.
RMS_FACTOR = 1.25
MAX_FACTOR = 3.0
# For fp8, launches re-quantise in groups of 64 or 128 channels. One row rounded both ways differs
# by chance: of 300 single rows of 176 channels, two erred by more than 1.25 times as much.
TWINS = (batched_experts_torch, partial(batched_experts_torch, scale_group=64))


@dataclass(frozen=True)
class Model:
    """A model's experts as one rank holds them."""

    name: str
    ranks: int
    experts: int
    hidden: int
    inter: int
    top_k: int


MODELS = (
    Model("DeepSeek-V3 EP8", 8, 32, 7168, 2048, 8),
    Model("Qwen3-235B EP8", 8, 16, 4096, 1536, 8),
    Model("Qwen3-30B EP2", 2, 64, 2048, 768, 8),
    Model("Mixtral EP8", 8, 1, 4096, 14336, 2),
)


@dataclass(frozen=True)
class Layer:
    """Arguments of `batched_experts`, with the counts as the host knows them."""

    x: torch.Tensor
    x_scale: torch.Tensor | None
    weights: ExpertWeights
    counts: tuple[int, ...]

    def args(self) -> tuple:
        """Positional arguments up to `masked_m`."""
        masked_m = torch.tensor(self.counts, dtype=torch.int32, device=self.x.device)
        return self.x, self.x_scale, self.weights, masked_m

    def poisoned_output(self) -> torch.Tensor:
        """A bf16 output full of NaN."""
        return torch.full(self.x.shape, torch.nan, dtype=torch.bfloat16, device=self.x.device)


def quantise_blocks(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [L, N, K] to float8_e4m3fn with one scale per 128x128 block (ragged tails)."""
    block = SCALE_BLOCK
    experts, n, k = w.shape
    rows, cols = -(-n // block), -(-k // block)
    padded = torch.nn.functional.pad(w.float(), (0, cols * block - k, 0, rows * block - n))
    tiles = padded.view(experts, rows, block, cols, block)
    scale = tiles.abs().amax((2, 4)).clamp_min(1e-10) / 448.0
    q = (tiles / scale[:, :, None, :, None]).reshape(experts, rows * block, cols * block)
    return q[:, :n, :k].to(torch.float8_e4m3fn).contiguous(), scale


def make_weights(
    experts: int, hidden: int, inter: int, fmt: Format, gen: torch.Generator
) -> ExpertWeights:
    """Random experts that keep activations near unit variance."""
    w13, w13_scale = _make_matrix(experts, 2 * inter, hidden, fmt.fp8_rows, gen)
    w2, w2_scale = _make_matrix(experts, hidden, inter, fmt.fp8_rows, gen)
    return ExpertWeights(w13, w2, w13_scale, w2_scale, fmt)


def _make_matrix(
    experts: int, n: int, k: int, fp8: bool, gen: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    w = torch.empty((experts, n, k), dtype=dtype, device=gen.device)
    scales = []
    for e in range(experts):
        dense = torch.randn((1, n, k), generator=gen, device=gen.device) / k**0.5
        if fp8:
            w[e : e + 1], scale = quantise_blocks(dense)
            scales.append(scale)
        else:
            w[e : e + 1] = dense
    return w, torch.cat(scales) if fp8 else None


def make_layer(
    capacity: int, hidden: int, inter: int, counts: tuple[int, ...], fmt: Format, device: str,
    seed: int = 0,
) -> Layer:  # fmt: skip
    """Random layer whose unused rows, data and scales alike, hold NaN."""
    gen = torch.Generator(device=device).manual_seed(seed)
    weights = make_weights(len(counts), hidden, inter, fmt, gen)
    return Layer(*make_rows(capacity, hidden, counts, fmt.fp8_rows, gen), weights, counts)


def make_rows(
    capacity: int, hidden: int, counts: tuple[int, ...], fp8: bool, gen: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows as dispatch delivers them, NaN past each count; scales column-major."""
    experts = len(counts)
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    shape = (experts, capacity, hidden)
    x = torch.full(shape, torch.nan, device=gen.device, dtype=torch.bfloat16).to(dtype)
    x_scale = None
    if fp8:
        blocks = (experts, hidden // SCALE_BLOCK, capacity)
        x_scale = torch.full(blocks, torch.nan, device=gen.device).transpose(1, 2)
    for e, m in enumerate(counts):
        rows = torch.randn((m, hidden), generator=gen, device=gen.device)
        if fp8:
            x[e, :m], x_scale[e, :m] = quantise_groups_torch(rows)
        else:
            x[e, :m] = rows
    return x, x_scale


def one_expert(weights: ExpertWeights, expert: int) -> ExpertWeights:
    """The same of a single expert."""
    tensors = {
        field.name: value[expert : expert + 1]
        for field in fields(weights)
        if isinstance(value := getattr(weights, field.name), torch.Tensor)
    }
    return replace(weights, **tensors)


def exact(layer: Layer, experts: list[int] | None = None) -> dict[int, torch.Tensor]:
    """The layer in float64 on the same (quantised) inputs, unrounded in between; live rows only."""
    inter = layer.weights.w2.shape[-1]
    result = {}
    for e in experts if experts is not None else range(len(layer.counts)):
        m = layer.counts[e]
        x = layer.x[e, :m]
        w13, w2 = dequantise_expert_torch(layer.weights, e)
        if layer.x_scale is not None:
            x = dequantise_groups_torch(x, layer.x_scale[e, :m])
        both = x.double() @ w13.double().T
        act = torch.nn.functional.silu(both[:, :inter]) * both[:, inter:]
        result[e] = act @ w2.double().T
    return result


def check(
    name: str,
    out: torch.Tensor,
    layer: Layer,
    experts: list[int] | None = None,
    twins: Sequence[Callable[..., torch.Tensor]] = TWINS,
) -> None:
    """Raise unless `out` errs no more than the plain-torch twins do, up to the stated factors,
    and NaN is still everywhere past the counts."""
    twins = twins[: 1 if layer.x_scale is None else None]
    expected = exact(layer, experts)
    for e, want in expected.items():
        m = layer.counts[e]
        assert out[e, m:].isnan().all(), f"{name}: expert {e} wrote past its {m} rows"
        if not m:
            continue
        one = (
            layer.x[e : e + 1, :m],
            None if layer.x_scale is None else layer.x_scale[e : e + 1, :m],
            one_expert(layer.weights, e),
            torch.tensor([m], dtype=torch.int32, device=out.device),
        )
        got = out[e, :m].double() - want
        refs = [twin(*one, m)[0].double() - want for twin in twins]
        assert got.isfinite().all(), f"{name}: expert {e} of {m} rows is not finite"
        rms, rms_ref = got.norm() / want.norm(), max(r.norm() for r in refs) / want.norm()
        assert rms <= RMS_FACTOR * rms_ref, f"{name}: expert {e} rms {rms:.2e}, torch {rms_ref:.2e}"
        top, top_ref = got.abs().max(), max(r.abs().max() for r in refs)
        assert top <= MAX_FACTOR * top_ref, f"{name}: expert {e} max {top:.2e}, torch {top_ref:.2e}"


def uniform_counts(experts: int, rows: int, capacity: int) -> tuple[int, ...]:
    """The same rows for every expert."""
    return (min(rows, capacity),) * experts


def one_hot_counts(experts: int, rows: int, capacity: int) -> tuple[int, ...]:
    """The same total on one expert, capped at the capacity."""
    return (min(capacity, experts * rows),) + (0,) * (experts - 1)


ROUTINGS = {"uniform": uniform_counts, "zipf": zipf_counts, "one-hot": one_hot_counts}
