"""Older hosts as overlays: their wheels without dependencies, in front of the pinned environment.

They resolve arguments there; they are not meant to serve. The wheels live in a cache directory
outside the checkout (``MOE_PLUGIN_TEST_CACHE``, default ``~/.cache/moe-plugin/hosts``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from moe_plugin.integration.host_checks import TESTED_HOSTS

OLDER = TESTED_HOSTS[:-1]


def cache() -> Path:
    """Where wheels and their unpacked trees are kept."""
    default = Path.home() / ".cache" / "moe-plugin" / "hosts"
    return Path(os.environ.get("MOE_PLUGIN_TEST_CACHE", default))


def overlay(version: str) -> Path:
    """A directory that holds ``sglang`` of this version; downloads and unpacks it once."""
    target = cache() / version
    if target.is_dir():
        return target
    wheels = cache() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    if not list(wheels.glob(f"sglang-{version}-*.whl")):
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"),
                *("--disable-pip-version-check", "--dest", str(wheels), f"sglang=={version}"),
            ],
            check=True,
            timeout=600,
        )
    (wheel,) = wheels.glob(f"sglang-{version}-*.whl")
    part = target.with_name(f"{version}.part")
    shutil.rmtree(part, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(part)
    part.rename(target)  # complete, or not there
    return target
