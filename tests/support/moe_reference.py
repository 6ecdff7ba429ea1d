"""A dense MoE layer in float64: what any route through ranks and buffers must compute."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import silu

from moe_plugin.kernels.experts_torch import (
    dequantise_blocks_torch,
    dequantise_groups_torch,
    quantise_groups_torch,
)

from .kernel_cases import quantise_blocks


@dataclass(frozen=True)
class MoECase:
    """One MoE layer over all ranks, with what each rank brings.

    Attributes:
        tokens: per rank, [n_r, H].
        topk_ids: per rank, [n_r, K] int64; -1 = no expert.
        topk_weights: per rank, [n_r, K] float32.
        w13: [E, 2I, H] of all experts.
        w2: [E, H, I].
    """

    tokens: list[torch.Tensor]
    topk_ids: list[torch.Tensor]
    topk_weights: list[torch.Tensor]
    w13: torch.Tensor
    w2: torch.Tensor


def make_case(
    counts: list[int],
    *,
    experts: int = 8,
    top_k: int = 3,
    hidden: int = 32,
    inter: int = 24,
    dtype: torch.dtype = torch.float32,
    routing: str = "random",
    seed: int = 0,
) -> MoECase:
    """A random layer. ``counts``: tokens per rank.

    ``routing``: random (one id in ten is -1), one (all to expert 1), none (only -1).
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tokens, ids, weights = [], [], []
    for n in counts:
        tokens.append(random(n, hidden).to(dtype))
        chosen = torch.stack(
            [torch.randperm(experts, generator=generator)[:top_k] for _ in range(n)]
            or [torch.empty(top_k, dtype=torch.int64)]
        )[:n]
        if routing in ("one", "none"):
            chosen = torch.full((n, top_k), -1)
            if routing == "one":
                chosen[:, 0] = 1
        elif n:
            chosen[torch.rand(n, top_k, generator=generator) < 0.1] = -1
        ids.append(chosen)
        weights.append(torch.rand(n, top_k, generator=generator))
    return MoECase(
        tokens,
        ids,
        weights,
        (random(experts, 2 * inter, hidden) / hidden**0.5).to(dtype),
        (random(experts, hidden, inter) / inter**0.5).to(dtype),
    )


def dense_moe(case: MoECase, rank: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """[n, H] output of ``rank``'s tokens, computed in ``dtype`` without any batching."""
    x = case.tokens[rank].to(dtype)
    inter = case.w2.shape[-1]
    out = torch.zeros_like(x)
    for expert in range(case.w13.shape[0]):
        both = x @ case.w13[expert].to(dtype).T
        y = (silu(both[:, :inter]) * both[:, inter:]) @ case.w2[expert].to(dtype).T
        weight = torch.where(case.topk_ids[rank] == expert, case.topk_weights[rank], 0).sum(1)
        out += weight.to(dtype).unsqueeze(1) * y
    return out


@dataclass(frozen=True)
class Fp8Experts:
    """A case's experts in float8_e4m3fn with one float32 scale per 128x128 block."""

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor

    @classmethod
    def of(cls, case: MoECase) -> Fp8Experts:
        """The case's weights, rounded."""
        return cls(*quantise_blocks(case.w13), *quantise_blocks(case.w2))

    def dequantised(self, case: MoECase) -> MoECase:
        """The case with the weights that FP8 experts stand for, in float32."""
        return replace(
            case,
            w13=dequantise_blocks_torch(self.w13, self.w13_scale),
            w2=dequantise_blocks_torch(self.w2, self.w2_scale),
        )


def dense_moe_fp8(case: MoECase, rank: int) -> torch.Tensor:
    """As :func:`dense_moe`, rounding where an FP8 layer rounds; ``case`` is dequantised."""
    x = dequantise_groups_torch(*quantise_groups_torch(case.tokens[rank]))
    inter = case.w2.shape[-1]
    out = torch.zeros_like(x)
    for expert in range(case.w13.shape[0]):
        both = x @ case.w13[expert].T
        act = silu(both[:, :inter]) * both[:, inter:]
        act = dequantise_groups_torch(*quantise_groups_torch(act))
        y = (act @ case.w2[expert].T).bfloat16()
        weight = torch.where(case.topk_ids[rank] == expert, case.topk_weights[rank], 0).sum(1)
        out += weight.unsqueeze(1) * y
    return out.bfloat16()
