"""The ledger of a plan: every value, who chose it, what binds it, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .facts import GRAPH_MULTIPLE, LaunchFacts
from .integers import floor_to
from .limits import Limits
from .memory import gib
from .plan import T_NAME, Budget, Plan, Source
from .row_budgets import RowBudget


def explain_plan(
    plan: Plan,
    launch: LaunchFacts,
    limits: Limits,
    budgets: Sequence[RowBudget],
    source: Source,
    most: int,
) -> Plan:
    """``plan`` with its values written down.

    Args:
        plan: the values.
        launch: topology, modes and what the user set.
        limits: of the transport.
        budgets: that bound rows, at the plan's T.
        source: who chose T.
        most: the largest T.
    """
    lines = [_tokens_per_rank(plan, launch, limits, source, most)]
    lines += [_rows(budget, plan.max_dispatch_tokens_per_rank) for budget in budgets]
    notes = [*plan.notes, *_notes(plan, launch, limits)]
    if limits.qp_depth:
        lines.append(_qp_depth(plan, launch, limits.qp_depth(plan.max_dispatch_tokens_per_rank)))
    if limits.buffer_bytes:
        lines.append(_buffer(plan, limits))
    return replace(plan, budgets=tuple(lines), notes=tuple(notes))


def _tokens_per_rank(
    plan: Plan, launch: LaunchFacts, limits: Limits, source: Source, most: int
) -> Budget:
    name = launch.max_tokens_source
    if launch.max_tokens is None and launch.host_tokens_per_rank is not None:
        name = limits.tokens_variable or name
    why = {
        "user": f"from {name}",
        "default": f"default of {limits.name or plan.capability.backend}",
        "derived": "what the explicit values below need, rounded up",
    }.get(source, "")
    bound = limits.max_tokens is not None and most >= floor_to(
        limits.max_tokens, plan.token_multiple
    )
    return Budget(
        T_NAME,
        plan.max_dispatch_tokens_per_rank,
        source,
        f"<= {most} " + (f"({limits.name} cap)" if bound else "(buffer bytes)"),
        most - plan.max_dispatch_tokens_per_rank,
        why,
        "--batched-dp-moe-max-tokens",
    )


def _rows(budget: RowBudget, tokens_per_rank: int) -> Budget:
    limit = budget.limit(tokens_per_rank)
    return Budget(
        budget.name,
        budget.value,
        "user" if budget.typed else "derived",
        f"none ({budget.bound})" if limit is None else f"<= {limit} ({budget.bound})",
        None if limit is None else limit - budget.value,
        budget.arithmetic,
        budget.flag,
    )


def _qp_depth(plan: Plan, launch: LaunchFacts, needed: int) -> Budget:
    raised = launch.qp_depth is not None and launch.qp_depth < needed
    return Budget(
        "nvshmem_qp_depth",
        plan.nvshmem_qp_depth,
        "host" if raised else "user" if launch.qp_depth is not None else "derived",
        f">= {needed}",
        None,  # it has no upper limit
        f"2 x ({plan.max_dispatch_tokens_per_rank} + 1) = {needed}",
        "NVSHMEM_QP_DEPTH",
    )


def _buffer(plan: Plan, limits: Limits) -> Budget:
    room = limits.max_buffer_bytes
    return Budget(
        "rdma_buffer_bytes",
        plan.rdma_buffer_bytes,
        "derived",
        f"< {room} bytes" if room else "none",
        room - plan.rdma_buffer_bytes if room else None,
        f"T {plan.max_dispatch_tokens_per_rank} x {plan.num_experts} experts x hidden "
        f"{plan.hidden_size}: {gib(plan.rdma_buffer_bytes)}",
    )


def _notes(plan: Plan, launch: LaunchFacts, limits: Limits) -> list[str]:
    notes = []
    graph, depth = launch.cuda_graph_max_bs_prefill, launch.qp_depth
    if plan.bounds_prefill and launch.prefill_graphs and graph and graph % GRAPH_MULTIPLE:
        notes.append(
            f"--cuda-graph-max-bs-prefill {graph}: the host captures multiples of 8 with DeepEP"
        )
    if limits.qp_depth and depth is not None:
        needed = limits.qp_depth(plan.max_dispatch_tokens_per_rank)
        if depth < needed:
            notes.append(
                f"NVSHMEM_QP_DEPTH={depth} is below {needed}: the host raises it to {needed} itself"
            )
    return notes
