"""Programs of `examples` that run ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("ranks", [1, 4])
def test_experts_on_cpu(ranks: int) -> None:
    """Every rank says how far it is from the dense layer; the program fails where that is far."""
    program = EXAMPLES / "experts_on_cpu.py"
    done = subprocess.run(
        [sys.executable, "-P", str(program), "--ranks", str(ranks)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("largest error") == ranks
    assert done.stdout.endswith("OK\n")
