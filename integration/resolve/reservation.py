"""Our bytes in the host's memory sizing, in place of its flat guess, on both of its paths.

*Flat*: the host sizes the KV cache before it captures graphs, and keeps back a guess for
everything after: 2 GiB for DeepEP with decode graphs, 1 GiB more with breakable prefill graphs,
whatever the capacity. *After capture*: it measures what is free then, and keeps back a small slack.

What exists when free memory is measured must not be reserved again: the buffer is created while
the model is built, whosever experts run, so it is not part of either reserve.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ...backends.deepep import NVSHMEM_FIXED_BYTES, NVSHMEM_GRANULE, limits_of
from ...capability import get_backend
from ...planning.compatibility import LEAVE, LEAVE_TEXT
from ...planning.memory import gib
from ...planning.plan import Change, Plan, Rejection, refusal
from ...planning.row_budgets import floor_to

FLOOR_MIB = 10 * 1024
"""Least reserve of the host on devices above 60 GiB, before the DeepEP guess."""
FLOOR_FROM_MIB = 60 * 1024
BREAKABLE_GUESS_MIB = 1024
LEAST_FRACTION = 0.05
"""Below this there is no room for weights and KV cache: refuse rather than fail after loading."""


def reserved_bytes(
    plan: Plan, *, after_capture: bool, decode_graphs: bool, prefill_graphs: bool
) -> int:
    """Bytes per rank to keep back, beyond what the host already measures.

    The experts' working memory exists once per allocator pool that runs them: once in the pool
    of the captured graphs, which decode and prefill share, and once in the ordinary pool for
    forwards that fit no graph. After capture the graphs' pool is measured.
    """
    eager = 1 if plan.bounds_prefill or not decode_graphs else 0
    in_graphs = (plan.captures_prefill and prefill_graphs) or (plan.bounds_decode and decode_graphs)
    captured = 1 if in_graphs else 0
    if after_capture:
        return eager * plan.workspace_bytes
    return (eager + captured) * plan.workspace_bytes


def reserve(server_args: Any, plan: Plan) -> Plan:
    """Correct ``mem_fraction_static`` where the host chose it; returns the plan with the bytes.

    Raises:
        BudgetError: the device cannot hold the buffer and the workspace at all.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution
    from sglang.srt.utils.common import get_device_memory_capacity

    cfg = resolving_view(server_args)
    if server_args.mem_fraction_static is not None or not str(cfg.device).startswith("cuda"):
        return plan
    total = get_device_memory_capacity(cfg.device)
    if total is None:
        return plan
    graphs = cfg.cuda_graph_config
    after_capture = _sized_after_capture(server_args)
    ours = reserved_bytes(
        plan,
        after_capture=after_capture,
        decode_graphs=graphs.decode.backend != "disabled",
        prefill_graphs=graphs.prefill.backend != "disabled",
    )
    kept = total * (1 - cfg.mem_fraction_static)
    if not after_capture:
        kept = _without_guess(kept, total, plan, server_args, cfg)
    # Rounded down: the host rounds to three digits, which is 80 MiB on an 80 GiB device.
    fraction = math.floor((1 - (kept + ours / 2**20) / total) * 1000) / 1000
    needed = ours + plan.rdma_device_bytes
    if 1 - (kept + needed / 2**20) / total < LEAST_FRACTION:
        raise refusal([_too_small(plan, needed, kept, total)], plan)
    declare_resolution(server_args, "moe_plugin", mem_fraction_static=fraction)
    return replace(plan, reserved_bytes=ours)


def _sized_after_capture(server_args: Any) -> bool:
    try:
        from sglang.srt.arg_groups.overrides import post_capture_kv_sizing_planned
    except ImportError:  # hosts without that path
        return False
    return bool(post_capture_kv_sizing_planned(server_args))


def _without_guess(kept: float, total: float, plan: Plan, server_args: Any, cfg: Any) -> float:
    """The host's reserve in MiB without what it guessed for DeepEP."""
    from sglang.srt.arg_groups import memory_hook

    guess = getattr(memory_hook, "reserve_for_deepep_a2a_mb", None)
    if cfg.moe_a2a_backend != "deepep" or guess is None:
        return kept
    kept -= guess(server_args)
    # In low-latency mode there is no NVLink buffer to touch first, which that guess was for. It
    # lies below the host's floor, so that only what stands above the floor can be taken back.
    if plan.bounds_prefill and cfg.cuda_graph_config.prefill.backend == "breakable":
        floor = FLOOR_MIB if total > FLOOR_FROM_MIB else 0
        kept = max(min(kept, floor), kept - BREAKABLE_GUESS_MIB)
    return kept


def _too_small(plan: Plan, needed: int, kept: float, total: float) -> Rejection:
    """Refuse, with the largest T whose bytes would leave the least fraction."""
    room = (total * (1 - LEAST_FRACTION) - kept) * 2**20
    # Buffer and workspace grow with T beside a fixed cost; one granule of the heap stays unused.
    fixed = NVSHMEM_FIXED_BYTES if plan.rdma_device_bytes else 0
    share = (room - fixed - NVSHMEM_GRANULE) / (needed - fixed)
    tokens = floor_to(int(plan.max_dispatch_tokens_per_rank * share), plan.token_multiple)
    got = (
        f"{gib(needed)} for buffer and workspace at {plan.max_dispatch_tokens_per_rank} tokens per "
        f"rank, {kept / 1024:.1f} GiB for everything else that runs"
    )
    allowed = f"at most {total / 1024:.0f} GiB with weights and KV cache"
    if tokens < plan.token_multiple:
        return Rejection("device memory", got, allowed, LEAVE_TEXT, LEAVE, "unsupported")
    changes: tuple[Change, ...] = (("--batched-dp-moe-max-tokens", str(tokens)),)
    variable = limits_of(get_backend(plan.capability.backend), plan.transport).capacity_variable
    changes += ((variable, None),) if variable else ()
    return Rejection(
        "device memory", got, allowed, f"--batched-dp-moe-max-tokens {tokens}", changes
    )
