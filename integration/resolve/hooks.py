"""The plugin's steps in the host's argument resolution: select, fill, reserve, verify.

Exceptions raised here reach the user, before any model is loaded. Nothing is patched: every step
wraps a named step of the host's pipeline through its own registration.

==========================================  =====================================================
before ``handle_cuda_graph_config``         ask the capability, plan, fill what is unset
after ``handle_gpu_memory_settings``        our bytes in place of the host's flat guess
after the last step                         hold the final values against the plan, or refuse
==========================================  =====================================================
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from ...errors import MoePluginError
from ...planning.plan import Plan, refusal
from ...planning.start_log import binding, bytes_of_a_rank, why_tokens
from ..attached_plan import attach_plan, note_decided, plan_of, take_decided
from ..flags import requested
from ..host_checks import newer_than_tested
from .exported_variables import export_variables, withdraw_variables
from .fills import SOURCE, fills_of
from .foresight import foresee
from .installation import foreign_device, runtime_problems, schedulers_are_ray_actors
from .launch_plan import plan_for
from .model_facts import model_facts
from .refusals import leave_alone, refuse_or_leave
from .rehearsal import completed_refusals
from .reservation import reserve
from .selection import not_batched, select_backend
from .verification import verify

logger = logging.getLogger(__name__)

Step = Callable[[Any], None]
Found = TypeVar("Found")


class Decision(NamedTuple):
    """A plan, the all-to-all that ``on`` selects for it, and the budgets that it fills."""

    plan: Plan
    selected: dict[str, Any]
    filled: dict[str, Any]


def install() -> None:
    """Register the resolution hooks, or none. Imports only the host's registration module.

    Raises:
        ValueError: this host has no step of one of these names.
    """
    from sglang.srt.arg_groups import resolution_hooks

    steps = {
        "handle_cuda_graph_config": _before_graph_config,
        "handle_gpu_memory_settings": _after_memory_settings,
        "validate_deepep_v2_dispatch_token_budget": _after_everything,
    }
    known = getattr(resolution_hooks, "_OVERRIDABLE_HOOKS", steps.keys())
    if unknown := steps.keys() - known:
        raise ValueError(f"this host resolves no {', '.join(sorted(unknown))}")
    for name, step in steps.items():
        resolution_hooks.register_resolution_hook(name)(step)


def _before_graph_config(server_args: Any, previous: Step) -> None:
    withdraw_variables()
    attach_plan(server_args, None)
    take_decided(server_args)
    if requested(server_args).switch != "off":
        with completed_refusals(server_args):
            decided = _ours(_decide, server_args)
        if decided is not None:
            _declare(server_args, decided)
    previous(server_args)


def _after_memory_settings(server_args: Any, previous: Step) -> None:
    previous(server_args)
    plan = plan_of(server_args)
    if plan is not None:
        attach_plan(server_args, reserve(server_args, plan))


def _after_everything(server_args: Any, previous: Step) -> None:
    previous(server_args)
    if requested(server_args).switch == "off":
        return
    planned = plan_of(server_args)
    with completed_refusals(server_args):
        plan = verify(server_args, planned) if planned else _ours(_verify_unplanned, server_args)
    attach_plan(server_args, plan)
    if plan is None:
        withdraw_variables()
        return
    export_variables(plan)
    _log(plan, **take_decided(server_args))


def _log(plan: Plan, selected: str = "", filled: str = "") -> None:
    """One block: what was decided, what binds, and what is left; then a line per warning."""
    logger.info(
        "batched data-parallel MoE: %d tokens per rank (%s), %s transport, %s experts",
        plan.max_dispatch_tokens_per_rank,
        why_tokens(plan),
        plan.transport,
        plan.experts,
    )
    if selected:
        logger.info("batched data-parallel MoE: selected %s", selected)
    if filled:
        logger.info("batched data-parallel MoE: filled %s", filled)
    if limits := binding(plan):
        logger.info("batched data-parallel MoE: bound by %s", "; ".join(limits))
    logger.info("batched data-parallel MoE: per rank %s", bytes_of_a_rank(plan))
    for note in (*plan.notes, *filter(None, [newer_than_tested()])):
        logger.warning("batched data-parallel MoE: %s", note)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _ours(step: Callable[[Any], Found | None], server_args: Any) -> Found | None:
    """A step that nothing of the launch depends on yet: its own mistakes break no launch."""
    try:
        return step(server_args)
    except MoePluginError as error:
        if not error.rejections:
            raise
        refuse_or_leave(server_args, error.rejections, error.plan)
        return None
    except Exception as error:
        if requested(server_args).switch == "on":
            raise
        logger.warning("moe_plugin: planning failed", exc_info=True)
        leave_alone(server_args, [f"planning failed: {type(error).__name__}: {error}"])
        return None


def _verify_unplanned(server_args: Any) -> Plan | None:
    return verify(server_args, None)


def _decide(server_args: Any) -> Decision | None:
    """What to make of the launch; nothing of it has changed yet."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    cfg = foresee(server_args, resolving_view(server_args))
    backend, mode, chosen = select_backend(server_args, cfg)
    plan = plan_for(server_args, cfg, backend, mode)
    if not plan.capability.ok:
        if requested(server_args).switch == "on":
            architecture = model_facts(server_args).architecture
            raise refusal([not_batched(plan.capability.reason, architecture)], plan)
        return None
    if problems := foreign_device(cfg) or schedulers_are_ray_actors(cfg):
        leave_alone(server_args, problems)
        return None
    if plan.errors:
        refuse_or_leave(server_args, plan.errors, plan)
        return None
    if problems := runtime_problems(plan.capability.backend):
        leave_alone(server_args, problems)
        return None
    return Decision(plan, chosen, fills_of(server_args, plan))


def _declare(server_args: Any, decided: Decision) -> None:
    """From here on the launch depends on us: a failure ends it."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    for what, values in (("selected", decided.selected), ("filled", decided.filled)):
        if values:
            declare_resolution(server_args, SOURCE, **values)
            note_decided(server_args, **{what: _listed(values)})
    # Before the host's own checks of chunk and graphs against T, which two backends have.
    export_variables(decided.plan)
    attach_plan(server_args, decided.plan)
