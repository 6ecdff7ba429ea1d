"""What only the running host and machine can tell: is DeepEP there, is the backend explicit."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from ..plan import Plan, Rejection

_checks_machine = True


def check_host(plan: Plan, server_args: Any, cfg: Any) -> Plan:
    """``plan`` with refusals that follow from this installation and from late flips."""
    errors = []
    if _checks_machine and _lacks_deep_ep(plan):
        errors.append(
            Rejection(
                "DeepEP",
                got="deep_ep is not installed",
                allowed="sgl-deep-ep, which sglang pins",
                fix="pip install sgl-deep-ep, or MOE_PLUGIN_TRANSPORT=torch (development only)",
                changes=(("MOE_PLUGIN_TRANSPORT", "torch"),),
                kind="unsupported",
            )
        )
    del server_args, cfg
    return replace(plan, errors=plan.errors + tuple(errors)) if errors else plan


def _lacks_deep_ep(plan: Plan) -> bool:
    built_in = plan.capability.backend == "deepep" and plan.transport == "deepep"
    return built_in and find_spec("deep_ep") is None


def skip_machine_checks() -> None:
    """For plans of another machine (``moe-plugin plan --target``)."""
    global _checks_machine
    _checks_machine = False
