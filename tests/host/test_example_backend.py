"""The example of a third-party backend, as an installed distribution."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.hosts import ROOT
from ..support.resolving import Worker

EXAMPLE = ROOT / "examples" / "third_party_backend"
FLAGS = ["--tp-size", "8", "--attn-dp-size", "8", "--moe-a2a-backend", "mori"]


@pytest.fixture
def installed(models: dict[str, str], tmp_path: Path) -> Iterator[Worker]:
    """A process that has it installed: its module, and the entry points of its pyproject.toml."""
    shutil.copy(EXAMPLE / "example_moe_backend.py", tmp_path)
    info = tmp_path / "example_moe_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-moe-backend\nVersion: 1\n")
    declared = (EXAMPLE / "pyproject.toml").read_text()
    (line,) = (line for line in declared.splitlines() if line.startswith("mori = "))
    entry = f"[moe_plugin.backends]\n{line.replace(chr(34), '')}\n"
    (info / "entry_points.txt").write_text(entry)
    here = str(ROOT / "tests" / "support")
    worker = Worker(models["qwen3"], env={"PYTHONPATH": f"{tmp_path}:{here}"})
    yield worker
    worker.close()


def test_budgets_follow_its_limits(installed: Worker, models: dict[str, str]) -> None:
    """T is its default, refused above its limit; and a hidden size that it lacks."""
    argv = ["--model-path", models["qwen3"], *FLAGS]
    good, over, hidden = installed.ask(
        [
            {"argv": argv, "log": True},
            {"argv": [*argv, "--batched-dp-moe-max-tokens", "1024"]},
            {"argv": ["--model-path", models["qwen3-235b"], *FLAGS]},
        ]
    )
    assert good["plan"], good["log"]
    assert good["plan"]["max_dispatch_tokens_per_rank"] == 128
    assert good["plan"]["rdma_buffer_bytes"] == 2 * 2 * 128 * 2048 * 128
    assert good["resolved"]["max_running_requests"] == 8 * 128
    assert "512 (made up for this example)" in over["error"]
    assert "hidden size" in hidden["error"]
