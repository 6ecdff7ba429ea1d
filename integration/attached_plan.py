"""The plan that rides on the host's arguments: attached in resolution, read in every scheduler."""

from __future__ import annotations

from typing import Any

from ..planning.plan import Plan

_PLAN = "_moe_plugin_plan"


def attach_plan(server_args: Any, plan: Plan | None) -> None:
    """Let ``plan`` ride on ``server_args``, to the host's child processes too; None: no plan."""
    setattr(server_args, _PLAN, plan)


def plan_of(server_args: Any) -> Plan | None:
    """The plan that rides on ``server_args``; None when this launch is not batched."""
    plan = getattr(server_args, _PLAN, None)
    return plan if isinstance(plan, Plan) else None


def was_resolved(server_args: Any) -> bool:
    """Whether our hooks ran over ``server_args``. Embedders can resolve it without them."""
    return hasattr(server_args, _PLAN)
