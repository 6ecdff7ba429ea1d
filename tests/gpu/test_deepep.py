"""Real DeepEP low latency on real GPUs: every case of :mod:`tests.gpu.cases`, told one by one.

One rank, two ranks (which share the GPU where there is only one: correct, slow), and as many ranks
as the machine has GPUs where there are three or more. Rank r uses GPU r modulo their number.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from moe_plugin.kernels.formats import BF16, FP8_BLOCK
from moe_plugin.runtime.runner import warm_up
from moe_plugin.runtime.stats import Stats
from moe_plugin.runtime.transports.guarded import GuardedTransport
from moe_plugin.runtime.transports.torch_dist import TorchTransport

from ..support import gpu_environment
from .case_runner import NAMES, run_cases
from .world import Sizes, World, layer_config

GPUS = torch.cuda.device_count()
SIZES = Sizes()
# DeepEP's own limit is 200e9 cycles, 100 s and more; its trap would hide who waited where.
CASE_LIMIT_S = 90.0
RUN_LIMIT_S = 400.0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(RUN_LIMIT_S + 100),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="requires an NVIDIA GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec("deep_ep") is None, reason="requires the deep_ep package"
    ),
]


def deepep_world(group: dist.ProcessGroup) -> World:
    """A guarded DeepEP buffer on this rank's GPU, created as the plugin creates it."""
    from moe_plugin.runtime.transports.deepep_ll import create_deepep_buffer

    rank, ranks = group.rank(), group.size()
    device = torch.device("cuda", rank % GPUS)
    torch.cuda.set_device(device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))  # of the dense reference
    config = layer_config(SIZES, ranks)
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
    sharing = len(range(rank % GPUS, ranks, GPUS))
    taken = (before - _free_bytes(group)) // sharing
    hint = buffer.get_low_latency_rdma_size_hint(
        config.max_num_tokens, config.hidden_size, ranks, config.num_experts
    )
    for weights in (BF16, FP8_BLOCK):
        warm_up(config, weights)
    if ranks <= GPUS:
        reference, where = TorchTransport(dist.new_group(backend="nccl")), device
    else:  # NCCL refuses two ranks on one GPU
        reference, where = TorchTransport(group), torch.device("cpu")
    return World(
        group,
        GuardedTransport(buffer, config.max_num_tokens, stats=Stats()),
        device,
        reference,
        where,
        SIZES,
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


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="1 rank"),
        pytest.param(2, id="2 ranks"),
        pytest.param(
            GPUS,
            id="a rank per GPU",
            marks=pytest.mark.skipif(GPUS < 3, reason=f"requires 3 or more GPUs, got {GPUS}"),
        ),
    ],
)
def outcome(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """One run of all cases per number of ranks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in gpu_environment.DEEPEP.items():
            patch.setenv(name, value)
        yield run_cases(request.param, deepep_world, limit_s=CASE_LIMIT_S, timeout_s=RUN_LIMIT_S)


@pytest.mark.parametrize("case", NAMES)
def test_deepep_low_latency(outcome: dict[str, str], case: str) -> None:
    """What :mod:`tests.gpu.cases` says of the case holds on every rank."""
    assert not outcome[case], outcome[case]
