"""The installed ``moe-plugin`` command, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command, without the caller's own variables of the plugin and of the host."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MOE_", "SGLANG_"))}
    return subprocess.run(
        [sys.executable, "-P", "-m", "moe_plugin.cli.main", *arguments],
        capture_output=True,
        text=True,
        env={**environment, **env},
        cwd=cwd,
        timeout=300,
        check=False,
    )


def plan_json(*arguments: str, **env: str) -> tuple[int, dict[str, Any]]:
    """(exit code, the one JSON object on standard output)."""
    done = run("plan", "--json", *arguments, **env)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)
