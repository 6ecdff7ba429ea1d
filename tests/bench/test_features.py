"""Runs of the feature tests, joined to one record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "features.py"


def _write(path: Path, device: str, *rows: tuple[str, str]) -> Path:
    features = [
        {"feature": "EPLB", "test": test, "outcome": outcome, "reason": ""}
        for test, outcome in rows
    ]
    record: dict[str, Any] = {
        "environment": {"device": device},
        "commands": [f"pytest {path.stem}"],
        "features": features,
    }
    path.write_text(json.dumps(record))
    return path


def _join(out: Path, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(SCRIPT), *map(str, files), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_last_outcome_of_a_test_counts(tmp_path: Path) -> None:
    first = _write(tmp_path / "b.json", "H100", ("one", "failed"), ("two", "passed"))
    second = _write(tmp_path / "a.json", "H100", ("one", "passed"), ("two", "skipped"))
    done = _join(tmp_path / "out.json", first, second)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert [row["outcome"] for row in record["features"]] == ["passed", "passed"]
    assert record["commands"] == ["pytest b", "pytest a"]


def test_other_machines_make_another_record(tmp_path: Path) -> None:
    files = [_write(tmp_path / f"{device}.json", device) for device in ("H100", "H200")]
    done = _join(tmp_path / "out.json", *files)
    assert done.returncode != 0
    assert "different environments" in done.stderr
