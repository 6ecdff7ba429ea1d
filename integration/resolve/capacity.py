"""The host's variable for T: what the user set, and what we export for the host to read."""

from __future__ import annotations

import os

from ...backends.deepep import limits_of
from ...capability import get_backend
from ...planning.limits import Limits
from ...planning.plan import Plan, Rejection, refusal

HOST_TOKENS_PER_RANK = 128
"""T of a host whose ``SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK`` is not set."""
_ours: dict[str, str] = {}
"""Variables that this process set by itself, so that a second resolution tells them apart."""


def user_tokens_per_rank(limits: Limits) -> int | None:
    """The host's variable for T as the *user* set it: not what this process exported itself.

    Raises:
        ConfigError: it is no integer. The host would warn and go on with its default.
    """
    name = limits.capacity_variable
    text = os.environ.get(name or "", "").strip()
    if not name or not text or name in _ours:
        return None
    try:
        return int(text)
    except ValueError:
        fix = f"{name}={limits.default_max_tokens}"
        got = f"{name}={text!r}, for which the host would take {HOST_TOKENS_PER_RANK}"
        changes = ((name, str(limits.default_max_tokens)),)
        error = Rejection("tokens per rank", got, "an integer", fix, changes, "config", True)
        raise refusal([error]) from None


def withdraw_capacity() -> None:
    """Take back what an earlier resolution in this process exported: it was not the user's."""
    for name, value in _ours.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    _ours.clear()


def export_capacity(plan: Plan) -> None:
    name = limits_of(get_backend(plan.capability.backend), plan.transport).capacity_variable
    value = str(plan.max_dispatch_tokens_per_rank)
    if name is not None and os.environ.get(name) != value:
        # Workers inherit it; the host reads it when it builds its dispatchers.
        _ours[name] = value
        os.environ[name] = value
