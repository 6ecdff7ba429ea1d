"""The planned bytes in the host's memory sizing, in place of its flat guess, on both of its paths.

*Flat*: the host sizes the KV cache before it captures graphs, and keeps back a guess for
everything after: 2 GiB for DeepEP with decode graphs, 1 GiB more with breakable prefill graphs,
whatever T is. The buffer is created once the KV cache is there, as on the stock host, so
that it is part of what is kept back. *After capture*: the host measures what is free then, and
keeps back a small slack; buffer and captured graphs are in what it measures.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ...planning.plan import T_NAME, Plan
from .fills import SOURCE
from .launch_facts import attn_dp_size

ROUNDING = 0.0011
"""Between two fractions of three digits that mean the same bytes."""


def reserve(server_args: Any, plan: Plan) -> Plan:
    """Set ``mem_fraction_static`` where the host chose it; returns the plan with the bytes."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution

    memory = plan.memory
    if memory is None or server_args.mem_fraction_static is not None:
        return plan
    cfg = resolving_view(server_args)
    chosen = float(cfg.mem_fraction_static)
    if _sized_after_capture(server_args):
        eager = plan.workspace_bytes if plan.runs_eagerly(attn_dp_size(cfg)) else 0
        fraction = math.floor((chosen - eager / memory.usable_bytes) * 1000) / 1000
        ours, taken = eager, memory.buffer_bytes + memory.workspace_bytes - eager
    else:
        # What the host takes for what the plan does not know of; less than nothing where it leaves
        # out what the plan counted, such as prefill graphs that do not go with the model.
        beside = memory.host_fraction - chosen
        beside = beside if abs(beside) > ROUNDING else 0.0
        fraction = math.floor((memory.mem_fraction_static - beside + 1e-9) * 1000) / 1000
        ours, taken = memory.buffer_bytes + memory.workspace_bytes, 0
    taken += memory.weights_bytes + memory.media_bytes
    left = int(memory.usable_bytes * fraction) - taken
    memory = replace(memory, mem_fraction_static=fraction).with_room(left)
    declare_resolution(server_args, SOURCE, mem_fraction_static=fraction)
    return replace(plan, reserved_bytes=ours, memory=memory)


def carried(plan: Plan, planned: Plan | None) -> Plan:
    """``plan`` of the resolved launch, with what memory decided before anything was resolved."""
    if planned is None:
        return plan
    tokens = plan.max_dispatch_tokens_per_rank
    before = {budget.name: budget for budget in planned.budgets}
    budgets = plan.budgets
    if T_NAME in before and before[T_NAME].value == tokens:
        budgets = tuple(before[T_NAME] if b.name == T_NAME else b for b in plan.budgets)
    return replace(
        plan, reserved_bytes=planned.reserved_bytes, memory=planned.memory, budgets=budgets
    )


def _sized_after_capture(server_args: Any) -> bool:
    try:
        from sglang.srt.arg_groups.overrides import post_capture_kv_sizing_planned
    except ImportError:  # hosts without that path
        return False
    return bool(post_capture_kv_sizing_planned(server_args))
