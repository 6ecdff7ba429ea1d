"""docs/features.md says no more than the records."""

from __future__ import annotations

import json
from pathlib import Path

from ..support.document_tables.features import (
    FEATURES,
    NOT_SEEN,
    feature_summary,
    feature_table,
    is_seen,
    read_rows,
)

MODULES = Path(__file__).parents[1] / "gpu" / "features"


def _record(folder: Path, name: str, device: str, *rows: tuple[str, str, str, str]) -> None:
    features = [
        {
            "feature": feature,
            "test": test,
            "outcome": outcome,
            "reason": "" if outcome == "passed" else text,
            "seen": {"what": text} if outcome == "passed" else {},
        }
        for feature, test, outcome, text in rows
    ]
    environment = {
        "device": device,
        "devices": "2",
        "date": "2026-01-01",
        "sglang": "1",
        "sgl-deep-ep": "2",
    }
    record = {"environment": environment, "commands": ["pytest"], "features": features}
    (folder / f"{name}-features.json").write_text(json.dumps(record))


def test_a_row_for_each_module() -> None:
    """By the name that the module gives its feature."""
    names = {
        line.split('"')[1]
        for path in MODULES.glob("test_*.py")
        for line in path.read_text().splitlines()
        if line.startswith("FEATURE = ")
    }
    assert names == set(FEATURES)


def test_nothing_is_seen_without_a_record(tmp_path: Path) -> None:
    """A CPU's is none."""
    _record(tmp_path, "a", "cpu", ("EPLB", "one", "passed", "fine"))
    assert feature_table(tmp_path).count(NOT_SEEN) == len(FEATURES)
    assert "Seen on" not in feature_summary(tmp_path)


def test_the_newest_outcome_counts_and_a_skip_hides_nothing(tmp_path: Path) -> None:
    """A failure stays until the same test passes."""
    gpu = "NVIDIA H100"
    _record(
        tmp_path,
        "a",
        gpu,
        ("EPLB", "one", "passed", "fine"),
        ("EPLB", "two", "failed", "hung"),
        ("mode auto", "three", "passed", "large | small"),
    )
    table = feature_table(tmp_path)
    assert "fine<br>**failed**: hung" in table
    assert "large \\| small" in table
    assert "2 H100, 2026-01-01, sglang 1, sgl-deep-ep 2" in table
    assert not is_seen(read_rows(tmp_path)["EPLB"])
    _record(
        tmp_path,
        "b",
        gpu,
        ("EPLB", "two", "passed", "no hang"),
        ("EPLB", "one", "skipped", "no GPUs"),
    )
    assert "fine<br>no hang" in feature_table(tmp_path)
    assert feature_summary(tmp_path).startswith("Seen on two GPUs: EPLB, mode auto. Not seen on")
