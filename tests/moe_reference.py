"""A dense MoE layer in float64: what any route through ranks and buffers must compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import silu


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
    """A random layer. ``counts``: tokens per rank; ``routing``: random, one (all to expert 1)."""
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
        if routing == "one":
            chosen = torch.full((n, top_k), -1)
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
