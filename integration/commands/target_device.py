"""Resolve arguments for a named device on a machine that has another one, or none.

Only for planning. The host asks for its device while it is imported, too (which quantisations
exist, which kernels are there), so a process answers for the target from before that import on.
What is left of this machine are its Python packages, and the files that the command line names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ...errors import ConfigError, explain
from . import stand_in_packages


@dataclass(frozen=True, slots=True)
class Target:
    """What resolution asks of a device.

    Attributes:
        name: as ``torch.cuda.get_device_name`` gives it.
        capability: compute capability (major, minor).
        memory_mib: total memory as ``nvidia-smi`` gives it, MiB.
        multiprocessors: streaming multiprocessors.
    """

    name: str
    capability: tuple[int, int]
    memory_mib: int
    multiprocessors: int


TARGETS = {
    "h100": Target("NVIDIA H100 80GB HBM3", (9, 0), 81559, 132),
    "h200": Target("NVIDIA H200", (9, 0), 143771, 132),
    "h20": Target("NVIDIA H20", (9, 0), 97871, 78),
    "h800": Target("NVIDIA H800", (9, 0), 81559, 132),
    "a100": Target("NVIDIA A100-SXM4-80GB", (8, 0), 81920, 108),
    "b200": Target("NVIDIA B200", (10, 0), 183359, 148),
}
DEFAULT_TARGET = "h100"
LOCAL = "local"
"""This machine's own device: nothing is overridden."""
CUDA_VERSION = "13.0"
"""Of SGLang's CUDA builds; where this machine's torch is built for CUDA, its version stands."""
_OF_THIS_MACHINE = (
    "CUDA_VISIBLE_DEVICES", "SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE", "SGLANG_USE_MLX",
)  # fmt: skip
"""Variables that choose a device of this machine. All others are part of the launch."""
_simulated: Target | None = None


def get_target(name: str) -> Target:
    """The target called ``name``; unknown names raise :class:`ConfigError`, listing what exists."""
    try:
        return TARGETS[name.strip().lower()]
    except KeyError:
        raise ConfigError(
            explain(
                "target device",
                got=repr(name),
                allowed=f"one of {sorted(TARGETS)}",
                fix=f"--target {DEFAULT_TARGET}",
            )
        ) from None


def simulate(target: Target) -> None:
    """From now on this process resolves arguments as on ``target``.

    Raises:
        RuntimeError: the host was imported before, or the process answers for another device.
    """
    global _simulated
    if _simulated == target:
        return
    if _simulated is not None or "sglang" in sys.modules:
        raise RuntimeError("a process answers for one device, from before sglang is imported")
    _simulated = target
    for name in _OF_THIS_MACHINE:
        os.environ.pop(name, None)
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # torch_npu and its like
    sys.modules["pynvml"] = None  # type: ignore[assignment]  # a driver here is not the target's
    stand_in_packages.install()
    _hide_platform_plugins()
    _answer_for(target)

    from sglang.srt.arg_groups import validation_hook
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.utils import common

    from ..resolve import installation

    common.get_nvgpu_memory_capacity = _constant(float(target.memory_mib))
    validation_hook.validate_ib_devices = _any_ib_device(validation_hook.validate_ib_devices)
    register_resolution_hook("handle_ssl_validation")(_allow_absent_keys)
    installation.skip_machine_checks()


def _answer_for(target: Target) -> None:
    """What torch says of the device; other kinds of device are not there."""
    import torch

    major, minor = target.capability
    total = target.memory_mib << 20
    answers: dict[str, Any] = {
        "is_available": True,
        "current_device": 0,
        "device_count": 8,
        "get_device_capability": target.capability,
        "get_device_name": target.name,
        "mem_get_info": (total, total),
        "get_device_properties": SimpleNamespace(
            name=target.name,
            major=major,
            minor=minor,
            total_memory=total,
            multi_processor_count=target.multiprocessors,
        ),
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _constant(value))
    for other in (torch.xpu, torch.mps):
        vars(other)["is_available"] = _constant(False)
    torch.version.cuda = torch.version.cuda or CUDA_VERSION
    torch.version.hip = None
    # Nothing is compiled here, and to import the compiler takes a second.
    torch.compile = _not_compiled


def _not_compiled(model: Any = None, **_options: Any) -> Any:
    """``torch.compile`` as a function or as a decorator, without the compiler."""
    return model if model is not None else lambda function: function


def _hide_platform_plugins() -> None:
    """Out-of-tree platforms answer for the devices of this machine, and would win over ours."""
    from importlib import metadata

    original = metadata.entry_points

    def entry_points(**selected: Any) -> Any:
        if selected.get("group") == "sglang.srt.platforms":
            return metadata.EntryPoints()
        return original(**selected)

    metadata.entry_points = entry_points


def _allow_absent_keys(server_args: Any, previous: Callable[[Any], None]) -> None:
    """TLS keys lie on the target: that they are not here refuses nothing."""
    try:
        previous(server_args)
    except ValueError as error:
        if "file not found" not in str(error):
            raise


def _any_ib_device(original: Callable[..., Any]) -> Callable[..., Any]:
    """The host's check of InfiniBand devices by form alone: sysfs lists those of this machine."""
    here = original.__globals__

    def validate(device_str: str | None) -> Any:
        if not device_str or not device_str.strip():
            return original(device_str)
        parsed = here["parse_ib_device_config"](device_str.strip())
        lists = [parsed] if isinstance(parsed, str) else list((parsed or {}).values())
        named = [name.strip() for text in lists for name in str(text).split(",")]
        real = here["os"]
        here["os"] = SimpleNamespace(
            path=SimpleNamespace(isdir=_constant(True)), listdir=_constant(named or ["none"])
        )
        try:
            return original(device_str)
        finally:
            here["os"] = real

    return validate


def _constant(value: Any) -> Any:
    def answer(*_args: Any, **_kwargs: Any) -> Any:
        return value

    return answer
