"""Run programs against the real host, each in a fresh process: hooks patch it for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .programs.program_io import MARK

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
_EMIT = "from program_io import emit\n"


def program(name: str) -> Path:
    """A file of `programs`, by its name."""
    path = PROGRAMS / f"{name}.py"
    assert path.exists(), path
    return path


HOOKED = program("hooked")
"""For `host_result`: what of the host is hooked in a scheduler process."""


def run_host(
    code: str | Path,
    *given: Any,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program, or code, in a process of its own, away from our `kernels` folder.

    Args:
        code: a file, or Python code.
        given: values that the program is given as JSON.
        env: more environment variables.
        cwd: its working directory.
    """
    what = [str(code)] if isinstance(code, Path) else ["-c", code]
    variables = {**os.environ, "SGLANG_PLATFORM": "moe_plugin_cpu", **(env or {})}
    path = [str(PROGRAMS), variables.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-P", *what, *(json.dumps(value) for value in given)],
        cwd=cwd or ROOT / "tests",
        env=variables | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=500,
    )


def host_result(code: str | Path, *given: Any, **options: Any) -> Any:
    """What a program passed to ``emit(value)``, by JSON; a failing process fails the test."""
    done = run_host(code if isinstance(code, Path) else _EMIT + code, *given, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert lines, f"no result:\n{done.stdout}{done.stderr}"
    return json.loads(lines[-1].removeprefix(MARK))
