"""Run code against the real host in a fresh process: hooks patch it for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MARK = "RESULT:"


def run_host(
    code: str, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, from a directory without a `kernels` folder."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=cwd or ROOT / "tests",
        env={**os.environ, "SGLANG_PLATFORM": "moe_plugin_cpu", **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
    )


def host_result(code: str, **options: Any) -> Any:
    """What ``code`` passed to ``emit(value)``, by JSON; a failing process fails the test."""
    emit = f"import json\ndef emit(value): print({_MARK!r} + json.dumps(value))\n"
    done = run_host(emit + code, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    assert lines, f"no result:\n{done.stdout}{done.stderr}"
    return json.loads(lines[-1].removeprefix(_MARK))
