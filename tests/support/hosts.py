"""Run code against the real host in a fresh process: hooks patch it for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HOST_EXPERTS = Path(__file__).with_name("host_experts.py")
_MARK = "RESULT:"
_EMIT = f"import json\ndef emit(value): print({_MARK!r} + json.dumps(value))\n"

HOOKED = """
import sglang.srt.managers.scheduler  # a process that runs model code
from sglang.srt.plugins import load_plugins
load_plugins()
from moe_plugin.integration.status import STATUS
emit(STATUS.hooked)
"""
"""Code for `host_result`: what of the host is hooked in a scheduler process."""


def run_host(
    code: str | Path,
    *,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Python code, or a file, in a process of its own, away from our `kernels` folder."""
    return subprocess.run(
        [sys.executable, "-P", *([str(code)] if isinstance(code, Path) else ["-c", code]), *args],
        cwd=cwd or ROOT / "tests",
        env={**os.environ, "SGLANG_PLATFORM": "moe_plugin_cpu", **(env or {})},
        capture_output=True,
        text=True,
        timeout=500,
    )


def host_result(code: str, **options: Any) -> Any:
    """What ``code`` passed to ``emit(value)``, by JSON; a failing process fails the test."""
    return _result(run_host(_EMIT + code, **options))


def host_script_result(code: str, folder: Path, **options: Any) -> Any:
    """The same from a file: the host's child processes import their parent's main module."""
    script = folder / "script.py"
    script.write_text(_EMIT + code)
    return _result(run_host(script, **options))


def _result(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    assert lines, f"no result:\n{done.stdout}{done.stderr}"
    return json.loads(lines[-1].removeprefix(_MARK))
