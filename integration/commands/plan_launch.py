"""Parse and resolve one command line by the host's own code, for a named device, and report it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from ...batched_backend import Capability
from ...errors import EXPLAINED, ConfigError, MoePluginError
from ...planning.plan import Plan, Rejection
from ...planning.report import render, table
from .. import flags
from ..attached_plan import plan_of
from ..resolve.launch_plan import capability_for
from ..status import STATUS
from . import target_device as targets
from .blame import host_rejection, internal, raised_by_us

Draw = Callable[[Sequence[Sequence[str]]], str]
"""How a table is shown; its first row is the head."""
_MODULE = "sglang.launch_server"
RESOLVED = (
    "chunked_prefill_size",
    "max_running_requests",
    "max_prefill_tokens",
    "mem_fraction_static",
    "moe_a2a_backend",
    "deepep_mode",
    "moe_runner_backend",
    "ep_size",
    "moe_dense_tp_size",
    "enable_dp_lm_head",
    "attention_backend",
    "speculative_num_draft_tokens",
)


def plan_launch(argv: Sequence[str], target: str, draw: Draw = table) -> dict[str, Any]:
    """Parse, resolve and report one command line. The process is the target's from then on."""
    return resolve(prepare(argv, target), draw)


def prepare(argv: Sequence[str], target: str) -> Any:
    """The host's parsed record, with our flags on it, in a process that answers for ``target``.

    The plugin is in it as it would be in the server: not at all where ``SGLANG_PLUGINS`` leaves it
    out, and inert where it is switched off.

    Raises:
        SystemExit: the host's parser refused the command line.
        ConfigError: a value of ours is wrong, or the host cannot read the command line.
        InternalError: a fault of our own.
    """
    if target != targets.LOCAL:
        targets.simulate(targets.get_target(target))
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.server_args import prepare_server_args

    try:
        return prepare_server_args(launch_flags(argv))
    except MoePluginError:
        raise
    except Exception as error:  # a --config file that is missing or malformed, mostly
        if raised_by_us(error):
            raise internal(error) from error
        raise ConfigError(f"SGLang cannot read this command line: {error}") from error


def launch_flags(argv: Sequence[str]) -> list[str]:
    """The flags of a launch, also of one pasted whole or with the model in first place."""
    words = list(argv)
    for start in (["sglang", "serve"], ["python", "-m", _MODULE], ["python3", "-m", _MODULE]):
        if words[: len(start)] == start:
            words = words[len(start) :]
    if words and not words[0].startswith("-"):
        words.insert(0, "--model-path")
    return words


def why_absent() -> str | None:
    """Why the server that this command starts would run without the plugin; None if it is in."""
    if STATUS.state == "active":
        return None
    allowed = os.environ.get("SGLANG_PLUGINS", "").strip()
    if STATUS.state != "not loaded":
        why = f"moe_plugin is {STATUS.state}: {'; '.join(STATUS.reasons)}"
    elif allowed:
        why = f"SGLANG_PLUGINS={allowed} leaves moe_plugin out"
    else:
        why = "SGLang does not find moe_plugin among its plugins (`moe-plugin doctor` says more)"
    return f"{why}. This server starts without it, and nothing bounds its batches"


def resolve(record: Any, draw: Draw = table) -> dict[str, Any]:
    """Resolve and check a record as the host does before it starts anything.

    Refusals, ours and the host's, become part of the answer.

    Args:
        record: what :func:`prepare` returned.
        draw: how the text of the answer shows its table.

    Raises:
        InternalError: a fault of our own.
    """
    with _warnings_of_ours() as warnings:
        plan, resolved = _resolve(record)
    said = (*plan.notes, plan.capability.reason)
    more = tuple(w for w in warnings if not any(text and text in w for text in said))
    return report(replace(plan, notes=plan.notes + more), resolved, draw)


def _resolve(record: Any) -> tuple[Plan, dict[str, Any] | None]:
    """(the plan with its refusals, what the host resolved)."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    try:
        record.resolve_once()
        # The launcher's own last checks (Engine._launch_subprocesses), before any process starts.
        record.check_server_args()
    except MoePluginError as error:
        rejections = error.rejections or (_rejection(error),)
        return replace(error.plan or _unplanned(record), errors=tuple(rejections)), None
    except Exception as error:  # the host's refusals have no common class
        if raised_by_us(error):
            raise internal(error) from error
        plan = plan_of(record) or _unplanned(record)
        return replace(plan, errors=(host_rejection(error),)), None
    view = resolved_view(record)
    resolved = {name: getattr(view, name, None) for name in RESOLVED}
    config = view.cuda_graph_config
    for phase in ("decode", "prefill"):
        found = getattr(config, phase)
        on = found.backend != "disabled"
        resolved[f"cuda_graph_max_bs_{phase}"] = found.max_bs if on else None
        resolved[f"cuda_graph_bs_{phase}"] = found.bs if on else None
    return plan_of(record) or _unplanned(record), resolved


def _rejection(error: MoePluginError) -> Rejection:
    """An error of ours that lists no rejections, taken apart again (``explain``)."""
    told = EXPLAINED.fullmatch(str(error))
    if told is not None:
        limit, got, allowed, fix = told.groups()
        return Rejection(limit, got, allowed, fix)
    return Rejection("moe_plugin", str(error), "a launch that it can plan", "moe-plugin doctor")


class _Notes(logging.Handler):
    """Appends every warning to a list."""

    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(record.getMessage().removeprefix("batched data-parallel MoE: "))


@contextlib.contextmanager
def _warnings_of_ours() -> Iterator[list[str]]:
    """What our own loggers warn of, as notes: the log itself is not shown."""
    found: list[str] = []
    handler = _Notes(found)
    logger = logging.getLogger("moe_plugin")
    logger.setLevel(logging.INFO)  # whatever --log-level is
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def _unplanned(record: Any) -> Plan:
    """The answer for a launch that has no plan: what the capability says, if it can be asked."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    if absent := why_absent():
        return Plan(capability=Capability(False, absent))
    request = flags.requested(record)
    if request.switch == "off":
        reason = request.left_alone or "--use-batched-dp-moe off"
        return Plan(capability=Capability(False, reason))
    cfg = resolving_view(record)
    try:
        return Plan(capability=capability_for(record, cfg, cfg.moe_a2a_backend, cfg.deepep_mode))
    except Exception as error:  # no readable model config: the host has said so already
        return Plan(capability=Capability(False, f"not known: {error}"))


def report(plan: Plan, resolved: dict[str, Any] | None, draw: Draw = table) -> dict[str, Any]:
    """The JSON object: plan, errors, and what the host resolved. 0 means "not bounded" there."""
    answer = plan.as_dict()
    for name in (
        "chunked_prefill_size",
        "max_running_requests",
        "cuda_graph_max_bs_decode",
        "cuda_graph_max_bs_prefill",
    ):
        answer[name] = answer[name] or None
    answer["resolved"] = resolved
    answer["text"] = render(plan, draw)
    return answer
