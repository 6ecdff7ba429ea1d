"""The ledger of a plan: every value, who chose it, what binds it, and the numbers behind it."""

from __future__ import annotations

from dataclasses import replace

from .facts import GRAPH_MULTIPLE, LaunchFacts
from .limits import Limits
from .memory import gib
from .plan import Budget, Plan, Source
from .row_budgets import ceil_div, chunk_per_group, floor_to, requests_per_group


def ledger(plan: Plan, launch: LaunchFacts, limits: Limits, source: Source, most: int) -> Plan:
    """``plan`` with its budgets and notes written down."""
    budgets = [_tokens(plan, launch, limits, source, most)]
    if plan.bounds_prefill:
        budgets += _prefill(plan, launch)
    if plan.bounds_decode and launch.disaggregation_mode != "prefill":
        budgets += _decode(plan, launch)
    notes = list(plan.notes)
    graph = launch.cuda_graph_max_bs_prefill
    if plan.bounds_prefill and launch.prefill_graphs and graph and graph % GRAPH_MULTIPLE:
        notes.append(
            f"--cuda-graph-max-bs-prefill {graph}: the host captures multiples of 8 with DeepEP"
        )
    if limits.qp_depth:
        needed = limits.qp_depth(plan.max_dispatch_tokens_per_rank)
        depth = launch.qp_depth
        raised = depth is not None and depth < needed
        budgets.append(
            Budget(
                "nvshmem_qp_depth",
                plan.nvshmem_qp_depth,
                "host" if raised else "user" if depth is not None else "derived",
                f">= {needed}",
                plan.nvshmem_qp_depth - needed,
                f"2 x ({plan.max_dispatch_tokens_per_rank} + 1) = {needed}",
                "NVSHMEM_QP_DEPTH",
            )
        )
        if raised:
            notes.append(
                f"NVSHMEM_QP_DEPTH={depth} is below {needed}: the host raises it to {needed} itself"
            )
    if limits.buffer_bytes:
        room = limits.max_buffer_bytes
        budgets.append(
            Budget(
                "rdma_buffer_bytes",
                plan.rdma_buffer_bytes,
                "derived",
                f"< {room} bytes" if room else "none",
                room - plan.rdma_buffer_bytes if room else None,
                f"T {plan.max_dispatch_tokens_per_rank} x {plan.num_experts} experts x hidden "
                f"{plan.hidden_size}: {gib(plan.rdma_buffer_bytes)}",
            )
        )
    return replace(plan, budgets=tuple(budgets), notes=tuple(notes))


def _source(value: int | None) -> Source:
    return "derived" if value is None else "user"


def _tokens(plan: Plan, launch: LaunchFacts, limits: Limits, source: Source, most: int) -> Budget:
    name = launch.max_tokens_source
    if launch.max_tokens is None and launch.capacity is not None and limits.capacity_variable:
        name = limits.capacity_variable
    why = {
        "user": f"from {name}",
        "default": f"default of {limits.name or plan.capability.backend}",
        "derived": "what the explicit values below need, rounded up",
    }.get(source, "")
    bound = limits.max_tokens is not None and most >= floor_to(
        limits.max_tokens, plan.token_multiple
    )
    limit = f"<= {most} " + (f"({limits.name} cap)" if bound else "(buffer bytes)")
    return Budget(
        "max_dispatch_tokens_per_rank",
        plan.max_dispatch_tokens_per_rank,
        source,
        limit,
        most - plan.max_dispatch_tokens_per_rank,
        why,
        "--batched-dp-moe-max-tokens",
    )


def _prefill(plan: Plan, launch: LaunchFacts) -> list[Budget]:
    tokens, scatter, groups = (
        plan.max_dispatch_tokens_per_rank,
        launch.attn_tp_size,
        launch.attn_dp_size,
    )
    chunk = chunk_per_group(plan.chunked_prefill_size, groups)
    rows = ceil_div(chunk, scatter)
    budgets = [
        Budget(
            "chunked_prefill_size",
            plan.chunked_prefill_size,
            _source(launch.chunked_prefill_size),
            f"<= {tokens * scatter * groups} (T x attention TP x DP)",
            tokens * scatter * groups - plan.chunked_prefill_size,
            f"{plan.chunked_prefill_size} / {groups} DP / {scatter} attention TP = {rows} rows",
            "--chunked-prefill-size",
        )
    ]
    if launch.prefill_graphs:
        graph = plan.cuda_graph_max_bs_prefill
        budgets.append(
            Budget(
                "cuda_graph_max_bs_prefill",
                graph,
                _source(launch.cuda_graph_max_bs_prefill),
                f"<= {tokens * scatter} (T x attention TP)",
                tokens * scatter - graph,
                f"{graph} / {scatter} attention TP = {ceil_div(graph, scatter)} rows",
                "--cuda-graph-max-bs-prefill",
            )
        )
    return budgets


def _decode(plan: Plan, launch: LaunchFacts) -> list[Budget]:
    scatter, groups, width = launch.attn_tp_size, launch.attn_dp_size, launch.draft_width
    fits = plan.max_dispatch_tokens_per_rank * scatter // width
    running = plan.max_running_requests
    per_group = requests_per_group(running, groups)
    drafts = f" x {width} draft tokens" if width > 1 else ""
    budgets = []
    if launch.decode_graphs:
        graph = plan.cuda_graph_max_bs_decode
        budgets.append(
            Budget(
                "cuda_graph_max_bs_decode",
                graph,
                _source(launch.cuda_graph_max_bs_decode),
                f"<= {fits} (T x attention TP // draft width)",
                fits - graph,
                f"{graph}{drafts} / {scatter} attention TP = "
                f"{ceil_div(graph * width, scatter)} rows",
                "--cuda-graph-max-bs-decode",
            )
        )
    budgets.append(
        Budget(
            "max_running_requests",
            running,
            _source(launch.max_running_requests),
            f"<= {fits * groups} (T x attention TP // draft width x DP)",
            fits * groups - running,
            f"{running} / {groups} DP = {per_group}{drafts} / {scatter} attention TP = "
            f"{ceil_div(per_group * width, scatter)} rows",
            "--max-running-requests",
        )
    )
    return budgets
