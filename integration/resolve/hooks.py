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
import sys
from collections.abc import Callable
from typing import Any

from ...errors import HostMismatchError
from ...planning.plan import Plan, refusal
from ..attached_plan import attach_plan, plan_of
from ..flags import requested, stand_down
from .capacity import export_capacity, withdraw_capacity
from .fills import fills_of
from .installation import runtime_problems
from .launch_plan import plan_for
from .model_facts import model_facts
from .reservation import reserve
from .selection import not_batched, select_backend
from .verification import verify

logger = logging.getLogger(__name__)

SOURCE = "moe_plugin"
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


def _before_graph_config(server_args: Any, previous: Step) -> None:
    withdraw_capacity()
    if requested(server_args).switch == "off":
        attach_plan(server_args, None)
    else:
        attach_plan(server_args, _plan_and_fill(server_args))
    previous(server_args)


def _after_memory_settings(server_args: Any, previous: Step) -> None:
    previous(server_args)
    plan = plan_of(server_args)
    if plan is not None:
        attach_plan(server_args, reserve(server_args, plan))


def _after_everything(server_args: Any, previous: Step) -> None:
    previous(server_args)
    if requested(server_args).switch == "off":
        return
    plan = verify(server_args, plan_of(server_args))
    attach_plan(server_args, plan)
    if plan is None:
        return
    export_capacity(plan)
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

    cfg = resolving_view(server_args)
    backend, mode, chosen = select_backend(server_args, cfg)
    plan = plan_for(server_args, cfg, backend, mode)
    if not plan.capability.ok:
        if requested(server_args).switch == "on":
            architecture = model_facts(server_args).architecture
            raise refusal([not_batched(plan.capability.reason, architecture)], plan)
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
