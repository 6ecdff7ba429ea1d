"""Records: each names its command, is listed, and is used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RECORDS = sorted(path.stem for path in RESULTS.glob("*.json"))
DOCUMENTS = [ROOT / "README.md", RESULTS / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_says_how_it_was_made(name: str) -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    assert record.get("command") or record.get("commands")


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_cited(name: str) -> None:
    """What no document cites any more is deleted; the list of all records does not count."""
    link = re.compile(rf"[(/]{name}\.json\)")
    assert any(link.search(document.read_text()) for document in DOCUMENTS)


def test_every_record_has_one_line() -> None:
    lines = (RESULTS / "README.md").read_text().splitlines()
    assert [line.split("`")[1] for line in lines if line.startswith("| `")] == RECORDS
