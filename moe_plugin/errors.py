"""Every error the package raises on purpose: one tree, one message shape."""

from __future__ import annotations

import re
from typing import Any

EXPLAINED = re.compile(r"(.+?): got (.+), allowed (.+)\. Fix: (.+)", re.DOTALL)
"""What :func:`explain` wrote, taken apart: what, got, allowed, fix."""


class MoePluginError(Exception):
    """Root of the tree; catch this to catch everything the plugin raises on purpose.

    Attributes:
        rejections: what a refused plan lists, each a :class:`moe_plugin.planning.plan.Rejection`.
        plan: the refused :class:`moe_plugin.planning.plan.Plan`, where planning got that far.
    """

    rejections: tuple[Any, ...] = ()
    plan: Any = None


class ConfigError(MoePluginError, ValueError):
    """A value, flag or variable of the user's that cannot work."""


class BudgetError(ConfigError):
    """A token budget that the all-to-all backend cannot carry."""


class UnsupportedError(MoePluginError, RuntimeError):
    """A combination that is valid but that this plugin, host or device cannot run."""


class HostMismatchError(UnsupportedError):
    """The host is outside the supported range or a symbol that we rely on changed."""


def explain(what: str, *, got: object, allowed: object, fix: str) -> str:
    """The one shape of our messages: what, got, allowed, and what fixes it.

    >>> explain("tokens per rank", got=0, allowed=">= 1", fix="--batched-dp-moe-max-tokens 256")
    'tokens per rank: got 0, allowed >= 1. Fix: --batched-dp-moe-max-tokens 256'
    """
    return f"{what}: got {got}, allowed {allowed}. Fix: {fix}"
