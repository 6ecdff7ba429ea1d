"""Parse and resolve one command line by the host's own code, for a named device, and report it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...batched_backend import Capability
from ...errors import ConfigError, MoePluginError
from ...planning.plan import Plan, Rejection
from ...planning.report import render
from .. import flags, plugin
from ..attached_plan import plan_of
from ..resolve.launch_plan import capability_for
from ..status import STATUS
from . import target_device as targets

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


def plan_launch(argv: Sequence[str], target: str) -> dict[str, Any]:
    """Parse, resolve and report one command line. The process is the target's from then on."""
    return resolve(prepare(argv, target))


def prepare(argv: Sequence[str], target: str) -> Any:
    """The host's parsed record, with our flags on it, in a process that answers for ``target``.

    Raises:
        SystemExit: the host's parser refused the command line.
        ConfigError: the plugin is not active here, or a value of ours is wrong.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    _require_active()
    from sglang.srt.server_args import prepare_server_args

    record = prepare_server_args(list(argv))
    if target != targets.LOCAL and not targets.is_simulated():
        targets.simulate(targets.get_target(target), record.model_path)
    return record


def _require_active() -> None:
    plugin.register()  # the host may have been told to load other plugins only
    if STATUS.state != "active":
        raise ConfigError(
            f"the plugin is {STATUS.state}: {'; '.join(STATUS.reasons)}. Fix: moe-plugin doctor"
        )


def resolve(record: Any) -> dict[str, Any]:
    """Resolve a record with the host's code; refusals become part of the answer."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    try:
        record.resolve_once()
    except MoePluginError as error:
        return report(error.plan or _unplanned(record), error.rejections, None)
    except Exception as error:  # the host's own refusals have no common class
        rejection = Rejection("host", f"{type(error).__name__}", "", str(error) or "see SGLang")
        return report(_unplanned(record), (rejection,), None)
    view = resolved_view(record)
    resolved = {name: getattr(view, name, None) for name in RESOLVED}
    config = view.cuda_graph_config
    for phase in ("decode", "prefill"):
        found = getattr(config, phase)
        on = found.backend != "disabled"
        resolved[f"cuda_graph_max_bs_{phase}"] = found.max_bs if on else None
        resolved[f"cuda_graph_bs_{phase}"] = found.bs if on else None
    return report(plan_of(record) or _unplanned(record), (), resolved)


def _unplanned(record: Any) -> Plan:
    """The answer for a launch that has no plan: what the capability says, if it can be asked."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    request = flags.requested(record)
    if request.switch == "off":
        reason = request.left_alone or "--use-batched-dp-moe off"
        return Plan(capability=Capability(False, reason))
    cfg = resolving_view(record)
    try:
        return Plan(capability=capability_for(record, cfg, cfg.moe_a2a_backend, cfg.deepep_mode))
    except Exception as error:  # no readable model config: the host has said so already
        return Plan(capability=Capability(False, f"not known: {error}"))


def report(
    plan: Plan, rejections: Sequence[Rejection], resolved: dict[str, Any] | None
) -> dict[str, Any]:
    """The JSON object: plan, errors, and what the host resolved. 0 means "not bounded" there."""
    if rejections:
        plan = replace(plan, errors=tuple(rejections))
    answer = plan.as_dict()
    for name in (
        "chunked_prefill_size",
        "max_running_requests",
        "cuda_graph_max_bs_decode",
        "cuda_graph_max_bs_prefill",
    ):
        answer[name] = answer[name] or None
    answer["resolved"] = resolved
    answer["text"] = render(plan)
    return answer
