"""Refuse to run a scheduler that would be unprotected although the plugin should act."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ...backends.deepep import limits_of
from ...capability import get_backend
from ...errors import HostMismatchError, UnsupportedError, explain
from ...planning.limits import HOST_TOKENS_PER_RANK
from .. import flags
from ..attached_plan import plan_of, was_resolved
from ..resolve.host_environment import environment_int
from ..resolve.launch_plan import capability_for, plan_for
from ..resolve.resolved_rows import check_final
from ..scheduler_symbols import SYMBOLS
from ..status import STATUS

logger = logging.getLogger(__name__)


def before_scheduler_init(_self: Any, server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE hook on ``Scheduler.__init__``.

    Raises:
        HostMismatchError: one of our hooks did not get in, and a plan relies on it.
        UnsupportedError: the arguments were resolved in a process without the plugin, and do not
            fit the host's own buffer either, or the plugin was asked for.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view

    plan = plan_of(server_args)
    if plan is not None:
        _check_hooks_applied()
        return
    if was_resolved(server_args) or flags.requested(server_args).switch == "off":
        return
    cfg = resolving_view(server_args)
    capability = capability_for(server_args, cfg, cfg.moe_a2a_backend, cfg.deepep_mode)
    if not capability.ok:
        return
    if flags.requested(server_args).switch == "auto" and _fits_by_hand(server_args, cfg):
        logger.warning("moe_plugin leaves this launch alone: its arguments were resolved before")
        return
    raise UnsupportedError(
        explain(
            "batched-DP MoE budgets",
            got=f"arguments resolved without the plugin, although {capability.reason}",
            allowed="arguments resolved after sglang.srt.plugins.load_plugins(), or values that "
            "fit the host's own tokens per rank",
            fix="call load_plugins() before ServerArgs.resolve_once(), or pass "
            f"{flags.SWITCH_FLAG} off to run without budgets",
        )
    )


def _fits_by_hand(server_args: Any, cfg: Any) -> bool:
    """Whether a launch that we did not plan stays within the host's own buffer: then it works as
    it always did, on the host's experts."""
    plan = plan_for(server_args, cfg, cfg.moe_a2a_backend, cfg.deepep_mode, late=True)
    limits = limits_of(get_backend(plan.capability.backend), plan.transport)
    if limits.tokens_variable is None or plan.transport == "torch":
        return False
    tokens = environment_int(limits.tokens_variable) or HOST_TOKENS_PER_RANK
    unplanned = replace(plan, max_dispatch_tokens_per_rank=tokens)
    return not check_final(unplanned, server_args, cfg)


def refuse_planned(_self: Any, server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE hook on ``Scheduler.__init__`` where the plugin is not active in this process.

    Raises:
        HostMismatchError: the launcher planned this launch, but our experts cannot run here.
    """
    if plan_of(server_args) is not None:
        raise HostMismatchError(
            f"this launch was planned by moe_plugin, which is {STATUS.state} in this process: "
            f"{'; '.join(STATUS.reasons)}. Fix: {flags.SWITCH_FLAG} off, or remove the cause"
        )


def _check_hooks_applied() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    optional = {symbol.target for symbol in SYMBOLS if symbol.without}
    missing = [
        target
        for target in STATUS.hooked
        if target not in optional and target not in HookRegistry._patched
    ]
    if missing:
        raise HostMismatchError(
            f"the host did not apply our hooks on {missing} (its log says why). "
            f"Fix: {flags.SWITCH_FLAG} off, or a supported SGLang"
        )
