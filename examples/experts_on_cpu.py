"""One MoE layer over several ranks, on CPU: dispatch, experts and combine as one call.

Each rank holds some of the experts and some of the tokens. The answer is compared with the same
layer computed in one place.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moe_plugin.kernels.weights import ExpertWeights
from moe_plugin.runtime.config import BatchedMoEConfig
from moe_plugin.runtime.metadata import DPMetadata
from moe_plugin.runtime.runner import make_moe_runner
from moe_plugin.runtime.transports.guarded import GuardedTransport
from moe_plugin.runtime.transports.torch_dist import TorchTransport

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 16, 4, 64, 32
MAX_TOKENS = 32  # T: no rank may dispatch more in one forward
LARGEST_ERROR = 1e-5  # float32: a few rounding steps of values near one


def layer_of_rank(rank: int, ranks: int, meeting: str) -> None:
    """What one rank does."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(0)  # the same model on every rank
    w13 = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator) / HIDDEN**0.5
    w2 = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) / INTERMEDIATE**0.5

    # Ranks may have different numbers of tokens, also none.
    counts = [MAX_TOKENS if r == 0 else r for r in range(ranks)]
    generator.manual_seed(rank + 1)
    tokens = torch.randn(counts[rank], HIDDEN, generator=generator)
    scores = torch.randn(counts[rank], EXPERTS, generator=generator).softmax(-1)
    weights, ids = scores.topk(TOP_K)

    config = BatchedMoEConfig(
        num_experts=EXPERTS,
        num_ranks=ranks,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        max_num_tokens=MAX_TOKENS,
    )
    mine = slice(rank * config.num_local_experts, (rank + 1) * config.num_local_experts)
    output = make_moe_runner(config, "cpu").forward(
        # The guard refuses more than T tokens, on all ranks at once where all counts are known.
        GuardedTransport(TorchTransport(group), MAX_TOKENS),
        tokens,
        ids,
        weights,
        ExpertWeights(w13[mine], w2[mine]),
        metadata=DPMetadata(tuple(counts)),
    )
    error = (output - dense(tokens, ids, weights, w13, w2)).abs().max().item()
    print(f"rank {rank}: {counts[rank]} tokens, largest error {error:.1e}", flush=True)
    dist.destroy_process_group()
    if error > LARGEST_ERROR:
        raise SystemExit(f"rank {rank}: {error} > {LARGEST_ERROR}")


def dense(
    tokens: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
) -> torch.Tensor:
    """The layer by its definition: every token asks its experts one by one."""
    output = torch.zeros_like(tokens)
    for k in range(ids.shape[1]):
        gate, up = torch.einsum("nh,nih->ni", tokens, w13[ids[:, k]]).chunk(2, dim=-1)
        act = torch.nn.functional.silu(gate) * up
        output += weights[:, k : k + 1] * torch.einsum("ni,nhi->nh", act, w2[ids[:, k]])
    return output


def main() -> None:
    """Start the ranks and wait for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help=f"a divisor of {EXPERTS}")
    ranks = parser.parse_args().ranks
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(layer_of_rank, args=(ranks, f"{folder}/meeting"), nprocs=ranks)
    print("OK")


if __name__ == "__main__":
    main()
