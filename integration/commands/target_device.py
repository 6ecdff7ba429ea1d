"""Resolve arguments for a named device on a machine that has none: the host's platform facts,
overridden in this process.

Only for planning. The host's modules are imported first, with the facts of the machine they run
on, so that none of them tries to load a GPU library; then the probes that resolution asks answer
for the target.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from ...errors import ConfigError, explain


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
_LAZY = (
    "sglang.srt.speculative.adaptive_spec_params",
    "sglang.srt.speculative.dflash_utils",
    "sglang.srt.speculative.dspark_components.dspark_config",
    "sglang.srt.layers.attention.dsa.utils",
    "sglang.srt.layers.cp.bcg",
)
"""Modules that some resolution steps import only when asked for."""
LOCAL = "local"
"""This machine's own device: nothing is overridden."""
_simulated = False


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


def is_simulated() -> bool:
    """Whether this process already answers for another device."""
    return _simulated


def simulate(target: Target, model_path: str) -> None:
    """From now on this process resolves arguments as on ``target``.

    Args:
        target: the device.
        model_path: a directory with ``config.json``, to walk the whole pipeline once.
    """
    global _simulated
    _import_host(model_path)
    _simulated = True
    import torch
    from sglang.srt.utils import common

    from ..resolve import installation

    answers: dict[str, Any] = {
        "is_available": True,
        "get_device_capability": target.capability,
        "get_device_name": target.name,
        "device_count": 8,
        "get_device_properties": SimpleNamespace(
            name=target.name,
            major=target.capability[0],
            minor=target.capability[1],
            total_memory=target.memory_mib << 20,
            multi_processor_count=target.multiprocessors,
        ),
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _constant(value))
    common.get_nvgpu_memory_capacity = _constant(float(target.memory_mib))
    for probe in vars(common).values():  # cached answers of the machine we run on
        if hasattr(probe, "cache_clear"):
            probe.cache_clear()
    installation.skip_machine_checks()


def _constant(value: Any) -> Any:
    def answer(*_args: Any, **_kwargs: Any) -> Any:
        return value

    return answer


def _import_host(model_path: str) -> None:
    """Import every module that resolution imports, by resolving once for a CPU."""
    import contextlib
    import logging

    from sglang.srt.server_args import ServerArgs

    environment = dict(os.environ)
    os.environ["MOE_PLUGIN_USE_BATCHED_DP_MOE"] = "off"
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        # What is wrong with the model or its arguments shows in the resolution that follows.
        with contextlib.suppress(Exception):
            ServerArgs(model_path=model_path, device="cpu").resolve_once()
        for name in _LAZY:
            with contextlib.suppress(Exception):  # not on every version
                import_module(name)
    finally:
        logging.disable(previous)
        os.environ.clear()
        os.environ.update(environment)
