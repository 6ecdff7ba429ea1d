"""The machine and the versions that a figure depends on."""

from __future__ import annotations

import datetime
import subprocess
import sys

from package_versions import package_versions


def environment() -> dict[str, str]:
    """Device, date and versions."""
    return {
        "device": smi("name") or _torch_name(),
        "date": datetime.date.today().isoformat(),
        **package_versions("sglang", "torch", "triton", "sgl-deep-ep", "sgl-deep-gemm"),
    }


def smi(field: str) -> str:
    """One field of nvidia-smi: asking torch would take memory that the servers share."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0]


def _torch_name() -> str:
    """The device's name where there is no nvidia-smi; in a process that gives its memory back."""
    code = (
        "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    return (done.stdout.split("\n") or ["unknown"])[0] or "unknown"
