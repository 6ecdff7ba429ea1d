"""A plan in the few lines that a server logs when it starts; `moe-plugin plan` has all of it."""

from __future__ import annotations

from .memory import gib
from .plan import T_NAME, Plan


def why_tokens(plan: Plan) -> str:
    """Where T comes from."""
    return next(budget.arithmetic for budget in plan.budgets if budget.name == T_NAME)


def binding(plan: Plan) -> list[str]:
    """Budgets that cannot grow, each with its limit."""
    return [f"{budget.name} {budget.limit}" for budget in plan.budgets if budget.headroom == 0]


def bytes_of_a_rank(plan: Plan) -> str:
    """What the plugin's parts take, and what they leave for the KV cache where that is known."""
    buffer, workspace, memory = plan.rdma_device_bytes, plan.workspace_bytes, plan.memory
    if memory is None:
        return f"{gib(buffer)} of buffer, {gib(workspace)} of workspace"
    left = gib(max(0, memory.kv_cache_bytes))
    rest = f"{left} left for weights and KV cache"
    if memory.weights_source:
        tokens = f", {memory.kv_cache_tokens} tokens" if memory.kv_cache_tokens else ""
        rest = f"{gib(memory.weights_bytes)} of weights, {left} left for the KV cache{tokens}"
    return f"{gib(buffer)} of buffer, {gib(memory.workspace_bytes)} of workspace, {rest}"
