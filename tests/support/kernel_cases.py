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
from moe_plugin.kernels.formats import FORMATS, SCALE_BLOCK, SWIGLU, Activation, Format
from moe_plugin.kernels.launch import Launch, Shape
from moe_plugin.kernels.packing import E2M1, MIDDLE, pack_codes, pack_scales
from moe_plugin.kernels.tuning.routings import (
    one_hot_counts,
    shuffled_zipf_counts,
    uniform_counts,
    zipf_counts,
)
from moe_plugin.kernels.tuning.tune import candidate_launches
from moe_plugin.kernels.weights import ExpertWeights

DIFFERENT = {name: fmt for name, fmt in FORMATS.items() if name != "int4_g32_zero"}
"""One format of each way to decode and to scale. What is left out differs in its groups, and in
that its zero points come off weights at 8 rows too."""
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
    Model("DeepSeek-V3 EP128", 128, 2, 7168, 2048, 8),
)


# Products have about unit variance, so that these limits meet a good part of them. The kinds that
# the host's models ask for, and each layout on its own.
ACTIVATIONS = {
    "plain": SWIGLU,
    "limited (DeepSeek-V4)": Activation(limit=0.5),
    "clamped (Step-3.5, GigaChat)": Activation("swiglu_clamped", limit=0.25),
    "scaled (MiniMax-M3)": Activation(alpha=1.702, beta=1.0, limit=0.75),
    "scaled, interleaved, bias (gpt-oss)": Activation(
        alpha=1.702, beta=1.0, limit=0.75, bias=True, interleaved=True
    ),
    "interleaved": Activation(interleaved=True),
    "bias": Activation(bias=True),
}


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


def quantise_channels(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [L, N, K] to float8_e4m3fn with one scale [L, N] per output channel."""
    scale = w.float().abs().amax(-1).clamp_min(1e-10) / 448.0
    return (w.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale


def quantise_tensors(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [L, N, K] to float8_e4m3fn with one scale [L] per matrix."""
    scale = w.float().abs().amax((1, 2)).clamp_min(1e-10) / 448.0
    return (w.float() / scale[:, None, None]).to(torch.float8_e4m3fn), scale


def quantise_codes(
    w: torch.Tensor, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Round [L, N, K] to codes of 0 to 15, with one scale [L, N, ceil(K / group)], bf16 or of MXFP4
    its exponent byte, and where the format has them one zero point per group (ragged tails)."""
    groups = -(-w.shape[-1] // fmt.group_size)
    padded = torch.nn.functional.pad(w.float(), (0, groups * fmt.group_size - w.shape[-1]))
    tiles = padded.unflatten(-1, (groups, fmt.group_size))
    if fmt.code == "e2m1":
        largest = tiles.abs().amax(-1).clamp_min(1e-10)
        exponent = torch.floor(torch.log2(largest)) - 2 + 127  # the largest code is 6
        values = tiles / torch.exp2(exponent - 127).unsqueeze(-1)
        steps = torch.tensor(E2M1, device=w.device)
        nearest = (values.abs().unsqueeze(-1) - steps).abs().argmin(-1)
        codes = nearest + 8 * (values < 0)
        return codes.flatten(-2)[..., : w.shape[-1]].to(torch.uint8), exponent.to(torch.uint8), None
    if fmt.zero_points:
        low, high = tiles.amin(-1).clamp_max(0), tiles.amax(-1).clamp_min(0)
        scale = ((high - low).clamp_min(1e-10) / 15).bfloat16()
        zero = (-low / scale.float()).round().clamp(0, 15)
        middle = zero.unsqueeze(-1)
    else:
        scale = (tiles.abs().amax(-1).clamp_min(1e-10) / 7).bfloat16()
        zero, middle = None, MIDDLE
    codes = ((tiles / scale.float().unsqueeze(-1)).round() + middle).clamp(0, 15)
    return codes.flatten(-2)[..., : w.shape[-1]].to(torch.uint8), scale, zero


def pack(w: torch.Tensor, fmt: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_codes` in the order of the kernels."""
    codes, scale, zero = quantise_codes(w, fmt)
    return pack_codes(codes, fmt), pack_scales(scale, w.shape[-1], fmt, zero)


QUANTISE = {"block": quantise_blocks, "channel": quantise_channels, "tensor": quantise_tensors}


def make_weights(
    experts: int, hidden: int, inter: int, fmt: Format, gen: torch.Generator,
    activation: Activation = SWIGLU,
) -> ExpertWeights:  # fmt: skip
    """Random experts that keep activations near unit variance."""
    if fmt.packed:
        activation = replace(activation, interleaved=False)
    w13, w13_scale = _make_matrix(experts, 2 * inter, hidden, fmt, gen)
    w2, w2_scale = _make_matrix(experts, hidden, inter, fmt, gen)
    bias = [
        torch.randn((experts, n), generator=gen, device=gen.device) / 2 if activation.bias else None
        for n in (2 * inter, hidden)
    ]
    return ExpertWeights(w13, w2, w13_scale, w2_scale, fmt, activation, *bias)


def _make_matrix(
    experts: int, n: int, k: int, fmt: Format, gen: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = torch.float8_e4m3fn if fmt.weight_bits == 8 else torch.bfloat16
    w = torch.empty((0 if fmt.packed else experts, n, k), dtype=dtype, device=gen.device)
    packed, scales = [], []
    for e in range(experts):
        dense = torch.randn((1, n, k), generator=gen, device=gen.device) / k**0.5
        # Channels of different sizes, so that no scale can stand for its neighbour's.
        dense *= 0.5 + torch.arange(n, device=gen.device)[:, None] % 7 / 6
        if fmt.packed:
            words, scale = pack(dense, fmt)
            packed.append(words)
            scales.append(scale)
        elif fmt.weight_bits == 8:
            w[e : e + 1], scale = QUANTISE[fmt.weight_scale](dense)
            scales.append(scale)
        else:
            w[e : e + 1] = dense
    return torch.cat(packed) if packed else w, torch.cat(scales) if scales else None


def make_layer(
    capacity: int, hidden: int, inter: int, counts: tuple[int, ...], fmt: Format, device: str,
    seed: int = 0, activation: Activation = SWIGLU,
) -> Layer:  # fmt: skip
    """Random layer whose unused rows, data and scales alike, hold NaN."""
    gen = torch.Generator(device=device).manual_seed(seed)
    weights = make_weights(len(counts), hidden, inter, fmt, gen, activation)
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
    weights, result = layer.weights, {}
    for e in experts if experts is not None else range(len(layer.counts)):
        m = layer.counts[e]
        x = layer.x[e, :m]
        w13, w2 = dequantise_expert_torch(weights, e)
        if layer.x_scale is not None:
            x = dequantise_groups_torch(x, layer.x_scale[e, :m])
        both = x.double() @ w13.double().T
        if weights.w13_bias is not None:
            both += weights.w13_bias[e]
        result[e] = exact_activation(both, weights.activation) @ w2.double().T
        if weights.w2_bias is not None:
            result[e] += weights.w2_bias[e]
    return result


def exact_activation(both: torch.Tensor, a: Activation) -> torch.Tensor:
    """Written down anew, so that a slip in the twin's is not repeated here."""
    gate, up = both.unflatten(-1, (-1, 2)).unbind(-1) if a.interleaved else both.chunk(2, -1)
    most = torch.inf if a.limit is None else a.limit
    up = torch.maximum(torch.minimum(up, up.new_tensor(most)), up.new_tensor(-most))
    if a.kind == "swiglu_clamped":
        return torch.minimum(gate / (1 + torch.exp(-gate)), gate.new_tensor(most)) * up
    gate = torch.minimum(gate, gate.new_tensor(most))
    return gate / (1 + torch.exp(-a.alpha * gate)) * (up + a.beta)


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


CANDIDATE_ROWS = (8, 16, 32, 64, 512)
"""Expected rows at which the tuner has every launch that it ever tries."""


def every_candidate(shape: Shape) -> dict[Launch, None]:
    """Those launches, each once."""
    return dict.fromkeys(c for rows in CANDIDATE_ROWS for c in candidate_launches(shape, rows))


ROUTINGS = {
    "uniform": uniform_counts, "zipf": zipf_counts, "shuffled": shuffled_zipf_counts,
    "one-hot": one_hot_counts,
}  # fmt: skip
