"""What ``moe-plugin doctor`` tells of the machine: GPUs, NVLink, RDMA devices, the environment."""

from __future__ import annotations

import contextlib
import os
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .finding import Finding

PREFIXES = ("NVSHMEM_", "NCCL_", "DEEPEP_", "EP_", "UCX_", "SGLANG_DEEPEP_")
NAMES = (
    "CUDA_VISIBLE_DEVICES",
    "LD_LIBRARY_PATH",
    "SGLANG_ENABLE_JIT_DEEPGEMM",
    "SGLANG_PLATFORM",
    "SGLANG_PLUGINS",
)
"""Variables that are shown where they are set. Not all of the host's: some hold secrets."""
IBGDA = ("PeerMappingOverride", "EnableStreamMemOPs", "RegistryDwords")
"""Driver settings that let a GPU post its own RDMA requests, as DeepEP does between nodes."""


def system() -> list[Finding]:
    """Operating system, Python, and the variables that steer transports."""
    findings = [
        Finding("machine", "system", "info", platform.platform()),
        Finding("machine", "python", "info", platform.python_version()),
    ]
    for name in sorted(os.environ):
        if name.startswith(PREFIXES) or name in NAMES:
            findings.append(Finding("environment", name, "info", os.environ[name]))
    return findings


def gpus() -> list[Finding]:
    """GPUs, driver and NVLink, as NVML tells; nothing where there is no driver."""
    with _nvml() as nvml:
        if nvml is None:
            return [Finding("machine", "NVIDIA driver", "info", "none that NVML can ask")]
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        names = Counter(_text(nvml.nvmlDeviceGetName(handle)) for handle in handles)
        driver, cuda = nvml.nvmlSystemGetDriverVersion(), nvml.nvmlSystemGetCudaDriverVersion()
        version = f"{_text(driver)}, for CUDA up to {cuda // 1000}.{cuda % 1000 // 10}"
        links = Counter(f"{_active_links(nvml, handle)} active links" for handle in handles)
        return [
            Finding("machine", "NVIDIA driver", "info", version),
            Finding("machine", "GPUs", "info", _counted(names)),
            Finding("machine", "NVLink", "info", _counted(links)),
        ]


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _active_links(nvml: Any, handle: Any) -> int:
    active = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            active += bool(nvml.nvmlDeviceGetNvLinkState(handle, link))
        except nvml.NVMLError:  # no such link on this device
            break
    return active


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _counted(found: dict[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(found.items())) or "none"


def rdma(root: Path = Path("/")) -> list[Finding]:
    """RDMA devices and what a GPU needs to reach them.

    Args:
        root: where ``sys`` and ``proc`` are.
    """
    devices = [_port(port) for port in sorted(root.glob("sys/class/infiniband/*/ports/*"))]
    text = "; ".join(devices) or "no InfiniBand or RoCE device: experts within one node only"
    findings = [Finding("machine", "RDMA", "info", text)]
    modules = {line.split(" ")[0] for line in _read(root / "proc/modules").splitlines()}
    for module in ("nvidia_peermem", "gdrdrv"):
        loaded = "loaded" if module in modules else "not loaded"
        findings.append(Finding("machine", module, "info", loaded))
    settings = _read(root / "proc/driver/nvidia/params").splitlines()
    told = [line.strip() for line in settings if line.strip().startswith(IBGDA)]
    if told:
        findings.append(Finding("machine", "driver settings", "info", "; ".join(told)))
    return findings


def _port(port: Path) -> str:
    state = _read(port / "state").rpartition(": ")[2] or "unknown"
    words = (f"{port.parents[1].name}/{port.name}", state, _read(port / "rate"))
    return " ".join(word for word in (*words, _read(port / "link_layer")) if word)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
