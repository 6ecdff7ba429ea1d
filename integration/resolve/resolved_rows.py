"""Rows per rank of what the host resolved: some values were rounded or replaced after planning."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from ...batched_backend import Mode
from ...planning.budget_checks import ROWS, nothing_to_capture, overruns
from ...planning.facts import LaunchFacts
from ...planning.integers import ceil_to
from ...planning.leaving import LEAVE, LEAVE_TEXT
from ...planning.plan import Plan, Rejection
from ...planning.row_budgets import RowBudget, requests_per_dp_group, row_budgets
from .launch_facts import launch_facts


def check_final(plan: Plan, server_args: Any, cfg: Any) -> list[Rejection]:
    """Refuse resolved values that T does not carry, by the arithmetic that the plan was made with.

    Args:
        plan: T, and the forward modes that it bounds.
        server_args: the raw record.
        cfg: the host's view of it, everything resolved.
    """
    tokens_per_rank, modes = plan.max_dispatch_tokens_per_rank, plan.capability.modes
    launch = resolved_facts(server_args, cfg)
    budgets = row_budgets(launch, modes, tokens_per_rank)
    errors = overruns(budgets, tokens_per_rank, ", as the host resolved it")
    if Mode.EXTEND in modes and launch.disaggregation_mode != "decode":
        errors += _check_chunking(launch, server_args, budgets)
    if Mode.DECODE in modes and launch.disaggregation_mode != "prefill":
        errors += _check_requests(launch, budgets)
    return errors + _check_captured(launch, cfg, modes)


def resolved_facts(server_args: Any, cfg: Any) -> LaunchFacts:
    """The launch with the budgets that the host resolved in place of what was typed."""
    launch = launch_facts(server_args, cfg, late=True)
    sizes = {phase: _sizes(cfg, phase) for phase in ("prefill", "decode")}
    return replace(
        launch,
        chunked_prefill_size=launch.known_chunk * launch.attn_dp_size,
        max_running_requests=cfg.max_running_requests,
        prefill_graphs=bool(sizes["prefill"]),
        decode_graphs=bool(sizes["decode"]),
        cuda_graph_max_bs_prefill=max(sizes["prefill"], default=None),
        cuda_graph_max_bs_decode=max(sizes["decode"], default=None),
    )


def _sizes(cfg: Any, phase: str) -> list[int]:
    """Batch sizes that a phase may capture; none where it captures no graphs."""
    found = getattr(cfg.cuda_graph_config, phase, None)
    if cfg.device == "cpu" or found is None or found.backend == "disabled":
        return []
    return [*(found.bs or ()), found.max_bs or 0]


def _budget(budgets: Sequence[RowBudget], name: str) -> RowBudget:
    return next(budget for budget in budgets if budget.name == name)


def _check_chunking(
    launch: LaunchFacts, server_args: Any, budgets: Sequence[RowBudget]
) -> list[Rejection]:
    """Chunked prefill must still be on."""
    if launch.known_chunk > 0:
        return []
    budget = _budget(budgets, "chunked_prefill_size")
    raw, allowed = server_args.chunked_prefill_size, f"chunks of at most {budget.most} tokens"
    if raw is None or raw > 0:
        got = "the host switched chunked prefill off (multi-item scoring, or this model)"
        return [Rejection(ROWS, got, allowed, LEAVE_TEXT, LEAVE)]
    change = (budget.flag, str(budget.most))
    return [Rejection(ROWS, "chunked prefill off", allowed, " ".join(change), (change,))]


def _check_requests(launch: LaunchFacts, budgets: Sequence[RowBudget]) -> list[Rejection]:
    """Running requests must be bounded."""
    if launch.max_running_requests is not None:
        return []
    budget = _budget(budgets, "max_running_requests")
    change = (budget.flag, str(budget.most))
    allowed = f"at most {budget.most} ({budget.bound})"
    return [Rejection(ROWS, f"{budget.name} unset", allowed, " ".join(change), (change,))]


def _check_captured(launch: LaunchFacts, cfg: Any, modes: Collection[Mode]) -> list[Rejection]:
    """A phase that captures graphs must have sizes to capture, or the host asserts."""
    errors, config, role = [], cfg.cuda_graph_config, launch.disaggregation_mode
    prefill_graphs = Mode.EXTEND in modes and role != "decode" and launch.prefill_graphs
    if prefill_graphs and not any(config.prefill.bs or ()):
        graph = launch.cuda_graph_max_bs_prefill or 0
        errors.append(nothing_to_capture(launch, "prefill", graph))
    running = launch.max_running_requests
    if Mode.DECODE in modes and role != "prefill" and launch.decode_graphs and running is not None:
        pool = ceil_to(requests_per_dp_group(running, launch.attn_dp_size), launch.host_alignment)
        sizes = config.decode.bs or ()
        if max(sizes, default=0) > pool:
            sizes = [*sizes, pool]
        captured = [n for n in sizes if n <= pool and n % launch.capture_multiple == 0]
        if min(captured, default=0) <= 0:
            errors.append(nothing_to_capture(launch, "decode", max(sizes, default=0)))
    return errors
