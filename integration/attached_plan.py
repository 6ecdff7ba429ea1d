"""The plan that rides on the host's arguments: attached in resolution, read in every scheduler.

Beside it, until resolution ends, what was decided on the way, for one block in the log.
"""

from __future__ import annotations

from typing import Any

from ..planning.plan import Plan

_PLAN = "_moe_plugin_plan"
_DECIDED = "_moe_plugin_decided"


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


def note_decided(server_args: Any, **values: Any) -> None:
    """Remember values that we chose on the way, beside those before them."""
    setattr(server_args, _DECIDED, {**getattr(server_args, _DECIDED, {}), **values})


def take_decided(server_args: Any) -> dict[str, Any]:
    """All that was remembered, which is then forgotten."""
    found: dict[str, Any] = getattr(server_args, _DECIDED, {})
    setattr(server_args, _DECIDED, {})
    return found
