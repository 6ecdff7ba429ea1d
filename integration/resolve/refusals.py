"""Refuse a launch, or leave it alone: under ``auto`` the plugin's presence never breaks one.

A refusal holds under ``auto`` only where the stock host would fail as well, or answer wrongly.
Every fix is applied, and the launch resolved with it, before it is printed: :mod:`rehearsal`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ...errors import HostMismatchError
from ...planning.plan import Plan, Rejection, refusal
from ..flags import requested, stand_down

logger = logging.getLogger(__name__)


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
    fatal = tuple(error for error in errors if not error.host_runs)
    if requested(server_args).switch == "on":
        fatal = tuple(errors)
    if fatal:
        raise refusal(fatal, plan)
    leave_alone(server_args, [f"{error.limit}: {error.got}" for error in errors])
