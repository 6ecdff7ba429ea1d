"""A guarded DeepEP buffer on this rank's GPU; rank r uses GPU r modulo their number."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from moe_plugin.kernels.formats import BF16, FP8_BLOCK
from moe_plugin.runtime.runner import warm_up
from moe_plugin.runtime.stats import Stats
from moe_plugin.runtime.transports.guarded import GuardedTransport
from moe_plugin.runtime.transports.torch_dist import TorchTransport

from .world import Sizes, World, layer_config


def deepep_world(group: dist.ProcessGroup, sizes: Sizes | None = None) -> World:
    """The buffer as the plugin creates it, and what to compare it with."""
    from moe_plugin.runtime.transports.deepep_ll import create_deepep_buffer

    sizes = sizes or Sizes()
    rank, ranks, gpus = group.rank(), group.size(), torch.cuda.device_count()
    device = torch.device("cuda", rank % gpus)
    torch.cuda.set_device(device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))  # of the dense reference
    config = layer_config(sizes, ranks)
    # As in the server: no kernel has run yet, and so the device has reserved no local memory.
    torch.empty(1, device=device)
    before = _free_bytes(group)
    buffer = create_deepep_buffer(
        group,
        max_num_tokens=config.max_num_tokens,
        hidden_size=config.hidden_size,
        num_experts=config.num_experts,
        qp_depth=max(1024, 2 * (config.max_num_tokens + 1)),
    )
    sharing = len(range(rank % gpus, ranks, gpus))
    taken = (before - _free_bytes(group)) // sharing
    hint = buffer.get_low_latency_rdma_size_hint(
        config.max_num_tokens, config.hidden_size, ranks, config.num_experts
    )
    for weights in (BF16, FP8_BLOCK):
        warm_up(config, weights)
    if ranks <= gpus:
        reference, where = TorchTransport(dist.new_group(backend="nccl")), device
    else:  # NCCL refuses two ranks on one GPU
        reference, where = TorchTransport(group), torch.device("cpu")
    return World(
        group,
        GuardedTransport(buffer, config.max_num_tokens, stats=Stats()),
        device,
        reference,
        where,
        sizes,
        ranks_per_device=sharing,
        hint=hint,
        taken=taken,
    )


def _free_bytes(group: dist.ProcessGroup) -> int:
    """Free memory of this rank's GPU while no rank changes it."""
    torch.cuda.synchronize()
    dist.barrier(group)
    free = torch.cuda.mem_get_info()[0]
    dist.barrier(group)
    return int(free)
