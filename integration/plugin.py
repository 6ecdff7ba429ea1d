"""The entry point that SGLang loads in each of its processes.

The host logs and swallows every exception of a plugin, so a failure here would leave an
unprotected server running. Therefore: nothing is half-registered, what happened is recorded in
``status.STATUS``, and where the user asked for us (``on``) and we cannot get in, the refusal is
raised at a point that can fail: argument parsing, resolution, or the scheduler's start.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from ..envs import DISABLE, USE_BATCHED_DP_MOE
from ..errors import ConfigError, HostMismatchError, MoePluginError
from . import flags, host_checks, host_symbols, scheduler_symbols
from .status import STATUS

logger = logging.getLogger(__name__)


class Hook(NamedTuple):
    """What we put before, after or around a symbol of the host.

    Attributes:
        symbol: what is hooked.
        function: takes what the symbol takes; after the result or the original, but BEFORE it.
        kind: of the host's ``HookType``.
        needs: other symbols that may be missing, without which this one is not hooked either.
    """

    symbol: host_symbols.HostSymbol
    function: Callable[..., Any]
    kind: Literal["BEFORE", "AFTER", "AROUND"]
    needs: tuple[host_symbols.HostSymbol, ...] = ()

    def missing(self) -> str | None:
        """What this host lacks that the plugin can do without, or None."""
        wanted = [symbol for symbol in (self.symbol, *self.needs) if symbol.without]
        problems = filter(None, map(host_checks.check_symbol, wanted))
        return next(problems, None)


def register() -> None:
    """Entry point of group ``sglang.srt.plugins``: cheap, idempotent, all or nothing."""
    if STATUS.state != "not loaded":
        return
    try:
        if DISABLE.read():
            STATUS.state = "disabled"
            STATUS.reasons = [f"{DISABLE.name} is set"]
            _register_inert()
            return
        STATUS.reasons = _install(runtime=_is_scheduler_process())
    except Exception as error:  # a mistyped switch, or a module that does not import here
        logger.debug("moe_plugin: registering failed", exc_info=True)
        ours = isinstance(error, MoePluginError)
        STATUS.reasons = [str(error) if ours else f"{type(error).__name__}: {error}"]
    if STATUS.reasons:
        STATUS.state = "unsupported"
        logger.warning("moe_plugin is not active: %s", "; ".join(STATUS.reasons))
        _register_inert()
    else:
        STATUS.state = "active"


def _install(*, runtime: bool) -> list[str]:
    """Register every hook; or none, and say why not. Whatever may fail comes before the first."""
    if problems := host_checks.problems(runtime=runtime):
        return problems
    from .resolve import hooks

    found = [*FLAG_HOOKS, *(runtime_hooks() if runtime else ())]
    missing = {hook.symbol.target: problem for hook in found if (problem := hook.missing())}
    hooks.install()
    for hook in found:
        if problem := missing.get(hook.symbol.target):
            logger.warning("moe_plugin does less here: %s: %s", hook.symbol.without, problem)
        else:
            _register(hook)
    return []


def refuse_if_asked(request: flags.Request) -> None:
    """Raise when the user asked for the plugin (``on``) but it is not active here."""
    if request.switch != "on" or STATUS.state == "active":
        return
    why = "; ".join(STATUS.reasons) or STATUS.state
    text = f"{request.switch_source} is on, but moe_plugin is {STATUS.state}: {why}"
    if "Fix: " not in why:
        text += f". Fix: remove it (or set {flags.SWITCH_FLAG} off), or remove the cause"
    raise ConfigError(text) if STATUS.state == "disabled" else HostMismatchError(text)


def _is_scheduler_process() -> bool:
    """Whether model code runs here: its entry module is imported before plugins load.

    Launchers that have not imported it stay light: a refusal then takes a second, not ten.
    """
    return "sglang.srt.managers.scheduler" in sys.modules


def _register(hook: Hook) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(hook.symbol.target, hook.function, HookType[hook.kind])
    STATUS.hooked.append(hook.symbol.target)


FLAG_HOOKS = (
    Hook(host_symbols.ADD_CLI_ARGS, flags.add_cli_args, "AROUND"),
    Hook(host_symbols.FROM_CLI_ARGS, flags.from_cli_args, "AROUND"),
)


def runtime_hooks() -> tuple[Hook, ...]:
    """What scheduler processes hook besides; imports what serves."""
    from .serve import (
        buffer,
        metrics,
        moe_layer,
        own_graphs,
        server_info,
        start_guard,
        steps,
        weight_updates,
    )

    of_steps = (scheduler_symbols.STEP_BATCH, scheduler_symbols.STEP_OUTPUT)
    return (
        Hook(scheduler_symbols.SCHEDULER_INIT, start_guard.before_scheduler_init, "BEFORE"),
        Hook(scheduler_symbols.MOE_INIT, moe_layer.around_moe_init, "AROUND"),
        Hook(scheduler_symbols.MEMORY_POOLS, buffer.after_memory_pools, "AFTER"),
        Hook(scheduler_symbols.GET_BUFFER, buffer.around_get_buffer, "AROUND"),
        Hook(
            scheduler_symbols.SYNC_VOTES,
            own_graphs.around_all_gather,
            "AROUND",
            needs=(scheduler_symbols.RUNTIME_FLAGS, scheduler_symbols.MLP_GATHER),
        ),
        Hook(scheduler_symbols.MODEL_FORWARD, steps.around_forward, "AROUND", needs=of_steps),
        Hook(scheduler_symbols.MOE_FORWARD, moe_layer.around_moe_forward, "AROUND"),
        Hook(scheduler_symbols.MOE_CORE, moe_layer.around_run_moe_core, "AROUND"),
        Hook(scheduler_symbols.INTERNAL_STATE, server_info.after_get_internal_state, "AFTER"),
        Hook(scheduler_symbols.LOAD_WEIGHTS, weight_updates.before_load, "BEFORE"),
        Hook(scheduler_symbols.TENSOR_UPDATE, weight_updates.around_update, "AROUND"),
        Hook(scheduler_symbols.IPC_UPDATE, weight_updates.around_update, "AROUND"),
        Hook(
            scheduler_symbols.DISTRIBUTED_UPDATE, weight_updates.around_distributed_update, "AROUND"
        ),
        Hook(
            scheduler_symbols.METRICS,
            metrics.after_init_metrics_collector,
            "AFTER",
            needs=(scheduler_symbols.MODEL_FORWARD, *of_steps),  # no count that stands still
        ),
    )


def _register_inert() -> None:
    """Parse our flags, refuse ``on``, and leave everything else of the host as it is."""
    if USE_BATCHED_DP_MOE.read() == "on":
        # Engine has no command line to refuse at, and only SystemExit passes the host's loader.
        try:
            refuse_if_asked(flags.Request("on", None, USE_BATCHED_DP_MOE.name))
        except (ConfigError, HostMismatchError) as error:
            raise SystemExit(f"error: {error}") from None
    if _is_scheduler_process() and not host_checks.check_symbol(scheduler_symbols.SCHEDULER_INIT):
        from .serve import start_guard

        _register(Hook(scheduler_symbols.SCHEDULER_INIT, start_guard.refuse_planned, "BEFORE"))
    if any(host_checks.check_symbol(hook.symbol) for hook in FLAG_HOOKS):
        return  # our flags stay unknown to the parser, which refuses them by itself

    def from_cli_args(original: Any, cls: type, args: Any) -> Any:
        server_args = flags.from_cli_args(original, cls, args)
        refuse_if_asked(flags.requested(server_args))
        return server_args

    _register(Hook(host_symbols.ADD_CLI_ARGS, flags.add_cli_args, "AROUND"))
    _register(Hook(host_symbols.FROM_CLI_ARGS, from_cli_args, "AROUND"))
