"""What only this installation can tell: is the backend's library there, and for this device."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from ...backends.deepep import DEEPEP
from ...batched_backend import BatchedBackend
from ...capability import get_backend
from ...planning.leaving import USE_DEEPEP
from ...planning.plan import Change, Plan, Rejection
from ..host_checks import check_symbol, problems
from ..scheduler_symbols import DISPATCHERS

_checks_machine = True


def check_host(plan: Plan, cfg: Any) -> Plan:
    """``plan`` with refusals that follow from this installation and device."""
    backend = get_backend(plan.capability.backend)
    if plan.transport == "torch" or not backend.module:
        return plan
    errors = []
    if _checks_machine and find_spec(backend.module) is None:
        errors.append(_not_installed(backend))
    if cfg.device == "cpu":
        errors.append(_not_on_cpu(backend))
    return replace(plan, errors=plan.errors + tuple(errors)) if errors else plan


def _not_installed(backend: BatchedBackend) -> Rejection:
    changes: tuple[Change, ...] = (("MOE_PLUGIN_TRANSPORT", "torch"),)
    allowed = "sgl-deep-ep, which sglang pins"
    fix = "pip install sgl-deep-ep, or MOE_PLUGIN_TRANSPORT=torch (development only)"
    if backend is not DEEPEP:
        changes, allowed = USE_DEEPEP, backend.package
        fix = f"install {backend.package}, or {DEEPEP.explicit_flag}"
    name = "DeepEP" if backend is DEEPEP else backend.limits.name
    got = f"{backend.module} is not installed"
    return Rejection(name, got, allowed, fix, changes, kind="unsupported")


def _not_on_cpu(backend: BatchedBackend) -> Rejection:
    if backend is DEEPEP:
        return Rejection(
            "transport",
            got="MOE_PLUGIN_TRANSPORT=deepep with --device cpu",
            allowed="torch on a CPU: DeepEP is CUDA only",
            fix="unset MOE_PLUGIN_TRANSPORT",
            changes=(("MOE_PLUGIN_TRANSPORT", None),),
            kind="config",
        )
    return Rejection(
        "transport",
        got=f"--moe-a2a-backend {backend.name} with --device cpu",
        allowed="deepep, which runs over torch there",
        fix=DEEPEP.explicit_flag,
        changes=USE_DEEPEP,
        kind="config",
    )


def runtime_problems(backend: str) -> list[str]:
    """What of the host's model code we cannot work with. Imports it, as the launcher will."""
    if not _checks_machine:
        return []
    found = problems(runtime=True)
    if backend in DISPATCHERS and (problem := check_symbol(DISPATCHERS[backend])):
        found.append(problem)
    return found


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
