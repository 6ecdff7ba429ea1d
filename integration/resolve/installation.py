"""What only this installation can tell: is DeepEP there, and can it run here at all."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from ...planning.plan import Plan, Rejection
from ..host_symbols import problems

_checks_machine = True


def check_host(plan: Plan, cfg: Any) -> Plan:
    """``plan`` with refusals that follow from this installation and from late flips."""
    errors = []
    if _checks_machine and _lacks_deep_ep(plan):
        errors.append(
            Rejection(
                "DeepEP",
                got="deep_ep is not installed",
                allowed="sgl-deep-ep, which sglang pins",
                fix="pip install sgl-deep-ep, or MOE_PLUGIN_TRANSPORT=torch (development only)",
                changes=(("MOE_PLUGIN_TRANSPORT", "torch"),),
                kind="unsupported",
            )
        )
    if plan.transport == "deepep" and cfg.device == "cpu" and plan.capability.backend == "deepep":
        errors.append(
            Rejection(
                "transport",
                got="MOE_PLUGIN_TRANSPORT=deepep with --device cpu",
                allowed="torch on a CPU: DeepEP is CUDA only",
                fix="unset MOE_PLUGIN_TRANSPORT",
                changes=(("MOE_PLUGIN_TRANSPORT", None),),
                kind="config",
            )
        )
    return replace(plan, errors=plan.errors + tuple(errors)) if errors else plan


def _lacks_deep_ep(plan: Plan) -> bool:
    built_in = plan.capability.backend == "deepep" and plan.transport == "deepep"
    return built_in and find_spec("deep_ep") is None


def runtime_problems() -> list[str]:
    """What of the host's model code we cannot work with. Imports it, as the launcher will."""
    if not _checks_machine:
        return []
    return problems(runtime=True)


def foreign_device(cfg: Any) -> list[str]:
    """Why this device is the host's alone: neither DeepEP nor our kernels are for it."""
    device = str(cfg.device)
    if device == "cpu":
        return []
    if not device.startswith("cuda"):
        return [f"--device {device}: batched data-parallel MoE is for CUDA"]
    import torch

    return ["ROCm: batched data-parallel MoE is for CUDA"] if torch.version.hip else []


def schedulers_are_ray_actors(cfg: Any) -> list[str]:
    """Why our experts would not reach the schedulers: Ray's actors load no plugins."""
    if getattr(cfg, "use_ray", False) or "sglang.srt.ray.engine" in sys.modules:
        return ["--use-ray or RayEngine: its schedulers load no plugins"]
    return []


def skip_machine_checks() -> None:
    """For plans of another machine (``moe-plugin plan --target``)."""
    global _checks_machine
    _checks_machine = False
