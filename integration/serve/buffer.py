"""The host's communication buffer, created from the plan.

SGLang creates ``DeepEPBuffer`` lazily, often while graphs are captured, sized by its first caller.
We create it as soon as the KV cache is there: the host sizes that from what is free, less what it
keeps back, and the buffer belongs to what it keeps back. Whether the ranks agree about its size is
asked while the model is built, before weights load.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from ...backends.deepep import NVSHMEM_GRANULE
from ...planning.integers import ceil_to
from ...planning.plan import Plan
from ...runtime.stats import STATS
from ...runtime.transports.agreement import check_ranks_agree, check_room
from ...runtime.transports.guarded import GuardedTransport
from . import process

logger = logging.getLogger(__name__)

CREATED = (
    "moe_plugin: DeepEP buffer for %d tokens per rank, %d MiB asked, %d MiB taken, %d MiB planned"
)


def prepare_host(plan: Plan) -> None:
    """Let the host build its dispatcher although deep_ep does not import (torch transport)."""
    from sglang.srt.layers.moe.token_dispatcher import deepep

    if plan.transport == "torch":
        deepep.use_deepep = True


_announced: list[Any] = []
"""The host's low-latency dispatcher that will create this process's buffer; empty before, and once
it has."""


def announce(dispatcher: Any) -> None:
    """A layer has been built: compare the ranks, and remember who creates the buffer.

    Transports that take no device memory are created at once.
    """
    plan = process.current_plan()
    inners = getattr(dispatcher, "_inners", [dispatcher])
    found = [impl for inner in inners if (impl := implementation(inner)) is not None]
    if plan is None or not found:
        return
    if plan.transport == "torch":
        for inner in found:
            inner._get_buffer()
    elif not _announced:
        _announced.append(found[0])
        if not process.joins_serving_ranks():  # they would not take part
            sizes = _sizes(plan, found[0].hidden_size, found[0].num_experts)
            check_ranks_agree(_cpu_group(), sizes)


def after_memory_pools(result: Any, _scheduler: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER hook on ``Scheduler.init_memory_pools``: now the buffer, before graphs."""
    while _announced:
        create = getattr(_announced.pop(), "_get_buffer", None)
        if create is not None:  # pplx has made its own, when the weights' dtype told it of rows
            create()
    return result


def implementation(dispatcher: Any) -> Any:
    """What dispatches in low latency behind the host's dispatcher; None where nothing does."""
    found = getattr(dispatcher, "_low_latency_dispatcher", None)
    return found if found is not None else getattr(dispatcher, "_impl", None)


def _cpu_group() -> Any:
    """The ranks of the all-to-all, without a communicator on the device."""
    from sglang.srt.distributed.parallel_state import get_tp_group

    return get_tp_group().cpu_group


def _sizes(plan: Plan, hidden_size: int, num_experts: int) -> dict[str, int]:
    tokens = plan.max_dispatch_tokens_per_rank
    return {"tokens per rank": tokens, "experts": num_experts, "hidden size": hidden_size}


def around_get_buffer(
    original: Callable[..., Any],
    cls: Any,
    group: Any,
    hidden_size: int,
    param_bytes: int,
    deepep_mode: Any,
    num_max_dispatch_tokens_per_rank: int = -1,
    num_experts: int = -1,
) -> Any:
    """AROUND hook on ``DeepEPBuffer.get_deepep_buffer``: one guarded transport per process."""
    plan = process.current_plan()
    args = (group, hidden_size, param_bytes, deepep_mode)
    if plan is None:
        return original(cls, *args, num_max_dispatch_tokens_per_rank, num_experts)
    state = cls._state()
    if state.buffer is not None:
        return state.buffer
    state.hidden_size = hidden_size
    state.num_experts = num_experts
    state.num_max_dispatch_tokens_per_rank = plan.max_dispatch_tokens_per_rank
    state.buffer = GuardedTransport(
        _create(original, cls, plan, args, num_experts),
        plan.max_dispatch_tokens_per_rank,
        metadata=process.current_metadata,
        mode=process.current_mode,
    )
    return state.buffer


def _create(
    original: Callable[..., Any], cls: Any, plan: Plan, args: tuple[Any, ...], num_experts: int
) -> Any:
    group, hidden_size, _, deepep_mode = args
    tokens = plan.max_dispatch_tokens_per_rank
    sizes = _sizes(plan, hidden_size, num_experts)
    if plan.transport == "torch":
        from ...runtime.transports.torch_dist import TorchTransport

        check_ranks_agree(group, sizes)
        return TorchTransport(group)
    # Before the ranks are compared on their devices, as DeepEP would compare them by itself: the
    # first collective makes NCCL's communicator, which fails without a word about memory, and
    # reserves a share of the kernels' local memory.
    free_before = _free_bytes()
    check_room(_cpu_group(), ceil_to(plan.rdma_buffer_bytes, NVSHMEM_GRANULE), free_before)
    check_ranks_agree(group, sizes)
    if deepep_mode.enable_normal():  # mode auto: one buffer serves both, the host sizes it
        return original(cls, *args, tokens, num_experts)
    return _create_low_latency(plan, group, hidden_size, num_experts, free_before)


def _free_bytes() -> int:
    """Free memory of this process's GPU when nothing runs; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # what torch keeps for later is no room for the buffer, but can be
    return int(torch.cuda.mem_get_info()[0])


def _create_low_latency(
    plan: Plan, group: Any, hidden_size: int, num_experts: int, free_before: int
) -> Any:
    from sglang.srt.layers.moe.token_dispatcher.deepep import _is_mnnvl_fabric_supported

    from ...runtime.transports.deepep_ll import create_deepep_buffer

    created = create_deepep_buffer(
        group,
        max_num_tokens=plan.max_dispatch_tokens_per_rank,
        hidden_size=hidden_size,
        num_experts=num_experts,
        qp_depth=plan.nvshmem_qp_depth,
        allow_mnnvl=_is_mnnvl_fabric_supported(),
        explicitly_destroy=False,
    )
    taken = free_before - _free_bytes()
    STATS.record_device_bytes("buffer", taken)
    logger.info(
        CREATED,
        plan.max_dispatch_tokens_per_rank,
        plan.rdma_buffer_bytes >> 20,
        taken >> 20,
        plan.rdma_device_bytes >> 20,
    )
    return created
