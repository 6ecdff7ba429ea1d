"""The host's variables of a backend: what the user set, and what we export for it to read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

from ...backends.deepep import limits_of
from ...capability import get_backend
from ...planning.limits import HOST_TOKENS_PER_RANK, Limits
from ...planning.plan import Change, Plan, Rejection, refusal

_ours: dict[str, str] = {}
"""Variables that this process set by itself, so that a second resolution tells them apart."""


def user_tokens_per_rank(limits: Limits) -> int | None:
    """The host's variable for T as the *user* set it: not what this process exported itself.

    Raises:
        ConfigError: it is no integer. The host would warn and go on with its default.
    """
    name = limits.tokens_variable
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


def withdraw_variables() -> None:
    """Take back what an earlier resolution in this process exported: it was not the user's."""
    for name, value in _ours.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    _ours.clear()


@contextlib.contextmanager
def changed_environment(changes: Iterable[Change]) -> Iterator[None]:
    """The user's environment with ``changes`` to it; afterwards everything is as before."""
    saved, ours = dict(os.environ), dict(_ours)
    withdraw_variables()
    try:
        for name, value in changes:
            if not name.startswith("-"):
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
        yield
    finally:
        os.environ.clear()
        os.environ.update(saved)
        _ours.clear()
        _ours.update(ours)


def export_variables(plan: Plan) -> None:
    """Set what the host reads, in this process and in those that it starts.

    T, which some backends are checked against during resolution and all read when dispatchers are
    built; and bf16 rows where our experts want them, if a variable decides for all layers.
    """
    backend = get_backend(plan.capability.backend)
    _export(limits_of(backend, plan.transport).tokens_variable, plan.max_dispatch_tokens_per_rank)
    if plan.runner == "moe_plugin" and not plan.fp8_rows:
        _export(backend.bf16_variable, 1)


def _export(name: str | None, value: int) -> None:
    if name and os.environ.get(name) != str(value):
        _ours[name] = os.environ[name] = str(value)
