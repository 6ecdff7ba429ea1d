"""Refuse a launch, or leave it alone: under ``auto`` the plugin's presence never breaks one.

A refusal holds under ``auto`` only where the stock host would fail as well, or answer wrongly.
Every fix is applied and planned again before it is printed, also those of refusals that are made
while the host resolves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from ...errors import HostMismatchError
from ...planning.leaving import LEAVE, LEAVE_TEXT
from ...planning.plan import Change, Plan, Rejection, refusal
from ..flags import requested, stand_down
from .launch_plan import plan_for

logger = logging.getLogger(__name__)

_A2A, _MODE, _SWITCH = "--moe-a2a-backend", "--deepep-mode", "--use-batched-dp-moe"


def leave_alone(server_args: Any, reasons: Sequence[str]) -> None:
    """We cannot act: ``auto`` leaves the host as it is, with one line; ``on`` refuses."""
    listed = "; ".join(reasons)
    if requested(server_args).switch == "on":
        raise HostMismatchError(
            f"moe_plugin cannot act on this launch: {listed}. Fix: remove "
            f"{requested(server_args).switch_source} or the cause, or use a supported SGLang"
        )
    logger.warning("moe_plugin leaves this launch alone: %s", listed)
    stand_down(server_args, f"left alone: {listed}")


def refuse_or_leave(server_args: Any, errors: Sequence[Rejection], plan: Plan | None) -> None:
    """Raise, or under ``auto`` leave alone what the stock host runs.

    Raises:
        ConfigError, UnsupportedError: what neither side runs; under ``on`` also what only the
            stock host runs.
    """
    fatal = [error for error in errors if not error.host_runs]
    if requested(server_args).switch == "on":
        fatal = list(errors)
    if fatal:
        raise refusal(fatal, plan)
    leave_alone(server_args, [f"{error.limit}: {error.got}" for error in errors])


def refuse(server_args: Any, cfg: Any, errors: Sequence[Rejection]) -> NoReturn:
    """Raise ``errors``, with what their fixes bring to light: one refusal, not one per start."""
    found = list(errors)
    changes = [change for error in found for change in error.changes]
    backend, mode = _after(cfg, changes)
    plan = None
    if backend is not None:
        plan = plan_for(server_args, cfg, backend, mode, changes=changes)
        if any(set(LEAVE) <= set(error.changes) for error in plan.errors):
            found = [replace(error, fix=LEAVE_TEXT, changes=LEAVE) for error in found]
        found += plan.errors
        plan = replace(plan, errors=tuple(found))
    raise refusal(found, plan)


def _after(cfg: Any, changes: Sequence[Change]) -> tuple[str | None, str]:
    """(all-to-all backend, mode) once the changes are made; no backend where none is wanted."""
    values = dict(changes)
    backend = values.get(_A2A, cfg.moe_a2a_backend)
    mode = values.get(_MODE, cfg.deepep_mode) or "auto"
    leaves = backend in (None, "none") or values.get(_SWITCH) in ("off", "auto")
    return (None if leaves else backend), mode
