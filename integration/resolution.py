"""The plugin's steps in the host's argument resolution: select, fill, reserve, verify.

Exceptions raised here reach the user, before any model is loaded. Nothing is patched: every step
wraps a named step of the host's pipeline through its own registration.

==========================================  =====================================================
before ``handle_cuda_graph_config``         ask the capability, plan, fill what is unset
after ``handle_gpu_memory_settings``        our bytes in place of the host's flat guess
after the last step                         hold the final values against the plan, or refuse
==========================================  =====================================================
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from ..capability import Capability, CapabilityFacts, backend_names, get_backend, use_batched_dp_moe
from ..deepep_limits import limits_of
from ..errors import HostMismatchError
from ..limits import Limits
from ..plan import Plan, Rejection, refusal
from .flags import requested, stand_down
from .support import check_host, runtime_problems

logger = logging.getLogger(__name__)

SOURCE = "moe_plugin"
HOST_TOKENS_PER_RANK = 128
"""T of a host whose ``SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK`` is not set."""
_PLAN = "_moe_plugin_plan"
_ours: dict[str, str] = {}
"""Variables that this process set by itself, so that a second resolution tells them apart."""
_installed = False

Step = Callable[[Any], None]


def install() -> None:
    """Register the resolution hooks. Idempotent; imports only the host's registration module."""
    global _installed
    if _installed:
        return
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    register_resolution_hook("handle_cuda_graph_config")(_before_graph_config)
    register_resolution_hook("handle_gpu_memory_settings")(_after_memory_settings)
    register_resolution_hook("validate_deepep_v2_dispatch_token_budget")(_after_everything)
    _installed = True


def plan_of(server_args: Any) -> Plan | None:
    """The plan that rides on ``server_args``; None when this launch is not batched."""
    plan = getattr(server_args, _PLAN, None)
    return plan if isinstance(plan, Plan) else None


def was_resolved(server_args: Any) -> bool:
    """Whether our hooks ran over ``server_args``. Embedders can resolve it without them."""
    return hasattr(server_args, _PLAN)


def _before_graph_config(server_args: Any, previous: Step) -> None:
    _withdraw_capacity()
    if requested(server_args).switch == "off":
        setattr(server_args, _PLAN, None)
    else:
        setattr(server_args, _PLAN, _plan_and_fill(server_args))
    previous(server_args)


def _after_memory_settings(server_args: Any, previous: Step) -> None:
    previous(server_args)
    plan = plan_of(server_args)
    if plan is not None:
        from .reservation import reserve

        setattr(server_args, _PLAN, reserve(server_args, plan))


def _after_everything(server_args: Any, previous: Step) -> None:
    previous(server_args)
    if requested(server_args).switch == "off":
        return
    from .verification import verify

    plan = verify(server_args, plan_of(server_args))
    setattr(server_args, _PLAN, plan)
    if plan is None:
        return
    _export_capacity(plan)
    logger.info(
        "batched data-parallel MoE: %d tokens per rank, %s transport, %s experts, %s bytes of "
        "buffer and %s of workspace per rank",
        plan.max_dispatch_tokens_per_rank,
        plan.transport,
        plan.runner,
        plan.rdma_device_bytes,
        plan.workspace_bytes,
    )
    for note in plan.notes:
        logger.warning("batched data-parallel MoE: %s", note)


def _plan_and_fill(server_args: Any) -> Plan | None:
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.arg_groups.overrides import declare_resolution

    from .facts import model_facts

    cfg = resolving_view(server_args)
    backend, mode, chosen = select_backend(server_args, cfg)
    plan = plan_for(server_args, cfg, backend, mode)
    if not plan.capability.ok:
        if requested(server_args).switch == "on":
            architecture = model_facts(server_args).architecture
            raise refusal([_not_batched(plan.capability.reason, architecture)], plan)
        return None
    if _schedulers_are_ray_actors(cfg):
        _stand_down(server_args, ["--use-ray or RayEngine: its schedulers load no plugins"])
        return None
    if plan.errors:
        raise refusal(plan.errors, plan)
    if unsound := runtime_problems():
        _stand_down(server_args, unsound)
        return None
    if chosen:
        declare_resolution(server_args, SOURCE, **chosen)
        listed = ", ".join(f"{name}={value}" for name, value in chosen.items())
        logger.info("--use-batched-dp-moe on: selected %s", listed)
    fills = fills_of(server_args, plan)
    if fills:
        declare_resolution(server_args, SOURCE, **fills)
        listed = ", ".join(f"{name}={value}" for name, value in fills.items())
        logger.info("batched data-parallel MoE: filled %s", listed)
    return plan


def _schedulers_are_ray_actors(cfg: Any) -> bool:
    return bool(getattr(cfg, "use_ray", False)) or "sglang.srt.ray.engine" in sys.modules


def _stand_down(server_args: Any, problems: list[str]) -> None:
    """Our experts cannot get in: ``auto`` leaves the host as it is, ``on`` refuses."""
    listed = "; ".join(problems)
    if requested(server_args).switch == "on":
        raise HostMismatchError(
            f"moe_plugin cannot act on this launch: {listed}. Fix: remove "
            f"{requested(server_args).switch_source} or the cause, or use a supported SGLang"
        )
    logger.warning("moe_plugin leaves this launch alone: %s", listed)
    stand_down(server_args)


def select_backend(server_args: Any, cfg: Any) -> tuple[str, str, dict[str, str]]:
    """(backend, mode, what ``on`` has to declare). Contradictions raise."""
    backend, mode = cfg.moe_a2a_backend, cfg.deepep_mode
    if requested(server_args).switch != "on":
        return backend, mode, {}
    _refuse_rivals(cfg)
    chosen = {}
    # The host cannot tell its defaults `none` and `auto` from a choice: both count as unset.
    if backend == "none":
        backend = chosen["moe_a2a_backend"] = "deepep"
    if backend not in backend_names():
        raise refusal(
            [
                Rejection(
                    "all-to-all backend",
                    got=f"--use-batched-dp-moe on with --moe-a2a-backend {backend}",
                    allowed=f"one of {backend_names()}",
                    fix="--moe-a2a-backend deepep, or --use-batched-dp-moe off",
                    changes=(("--moe-a2a-backend", "deepep"),),
                    kind="config",
                )
            ]
        )
    if backend == "deepep" and mode == "normal":
        raise refusal(
            [
                Rejection(
                    "deepep mode",
                    got="--use-batched-dp-moe on with --deepep-mode normal",
                    allowed="low_latency: normal mode has no batched layout",
                    fix="--deepep-mode low_latency, or --use-batched-dp-moe off",
                    changes=(("--deepep-mode", "low_latency"),),
                    kind="config",
                )
            ]
        )
    if backend == "deepep" and mode == "auto":
        mode = chosen["deepep_mode"] = "low_latency"
    return backend, mode, chosen


def _refuse_rivals(cfg: Any) -> None:
    """Features that rule out an all-to-all: the host has looked for one before we select ours."""
    rivals = {
        "--enable-pd-role-switch": getattr(cfg, "enable_pd_role_switch", False),
        "--dwdp-size": getattr(cfg, "dwdp_size", 1) > 1,
    }
    errors = [
        Rejection(
            "all-to-all backend",
            got=f"--use-batched-dp-moe on with {flag}, which the host does not allow together "
            "with an all-to-all",
            allowed="one of both",
            fix=f"remove {flag}, or --use-batched-dp-moe off",
            changes=((flag, None),),
            kind="config",
        )
        for flag, given in rivals.items()
        if given
    ]
    if errors:
        raise refusal(errors)


def _not_batched(reason: str, architecture: str) -> Rejection:
    return Rejection(
        "batched data-parallel MoE",
        got=f"--use-batched-dp-moe on, but {reason} ({architecture})",
        allowed="a model with routed MoE layers on a batched all-to-all backend",
        fix="--use-batched-dp-moe auto",
        changes=(("--use-batched-dp-moe", "auto"),),
        kind="unsupported",
    )


def capability_for(server_args: Any, cfg: Any, backend: str, mode: str) -> Capability:
    """The capability's answer for a backend and mode, on this model and launch."""
    from .facts import launch_facts, model_facts

    draft_backend = getattr(cfg, "speculative_moe_a2a_backend", None) or backend
    if not {backend, draft_backend} & set(backend_names()):
        # No model is worth a look: its config may not even be readable here.
        return use_batched_dp_moe(CapabilityFacts(a2a_backend=backend))
    model = model_facts(server_args)
    launch = launch_facts(server_args, cfg, backend=backend, mode=mode)
    return use_batched_dp_moe(launch.capability_facts(model))


def plan_for(server_args: Any, cfg: Any, backend: str, mode: str, *, late: bool = False) -> Plan:
    """Plan for a backend and mode with what the user set.

    Args:
        server_args: the raw record: what the user set.
        cfg: the host's live view of it.
        backend: the all-to-all backend to plan for.
        mode: the deepep mode to plan for.
        late: everything is resolved, so that the view's chunk is one DP group's.
    """
    from ..budgets import make_plan
    from .facts import launch_facts, model_facts, transport_of

    capability = capability_for(server_args, cfg, backend, mode)
    if not capability.ok:
        return Plan(capability=capability)
    limits = limits_of(get_backend(capability.backend), transport_of(cfg))
    capacity = user_capacity(limits)
    launch = launch_facts(
        server_args, cfg, backend=backend, mode=mode, capacity=capacity, late=late
    )
    plan = make_plan(model_facts(server_args), launch, limits, capability)
    return check_host(plan, cfg)


def fills_of(server_args: Any, plan: Plan) -> dict[str, int]:
    """The budgets that the user left unset, as declarations."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    from .facts import explicit_graph_max

    cfg = resolving_view(server_args)
    fills: dict[str, int] = {}
    if plan.bounds_prefill:
        if server_args.chunked_prefill_size is None:
            fills["chunked_prefill_size"] = plan.chunked_prefill_size
        if plan.cuda_graph_max_bs_prefill and explicit_graph_max(server_args, "prefill") is None:
            fills["cuda_graph_max_bs_prefill"] = plan.cuda_graph_max_bs_prefill
    if plan.bounds_decode and plan.max_running_requests:
        if server_args.max_running_requests is None:
            fills["max_running_requests"] = plan.max_running_requests
        if plan.cuda_graph_max_bs_decode and explicit_graph_max(server_args, "decode") is None:
            fills["cuda_graph_max_bs_decode"] = plan.cuda_graph_max_bs_decode
    return {name: value for name, value in fills.items() if hasattr(cfg, name)}


def user_capacity(limits: Limits) -> int | None:
    """The capacity variable as the *user* set it: not what this process exported itself.

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
        error = Rejection("tokens per rank", got, "an integer", fix, changes, "config")
        raise refusal([error]) from None


def _withdraw_capacity() -> None:
    """Take back what an earlier resolution in this process exported: it was not the user's."""
    for name, value in _ours.items():
        if os.environ.get(name) == value:
            del os.environ[name]
    _ours.clear()


def _export_capacity(plan: Plan) -> None:
    name = limits_of(get_backend(plan.capability.backend), plan.transport).capacity_variable
    value = str(plan.max_dispatch_tokens_per_rank)
    if name is not None and os.environ.get(name) != value:
        # Workers inherit it; the host reads it when it builds its dispatchers.
        _ours[name] = value
        os.environ[name] = value
