"""What was seen of each feature, as a file that `benchmarks/features.py` joins to a record."""

from __future__ import annotations

import datetime
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch

from .machine import OUT

PACKAGES = ("sglang", "torch", "triton", "sgl-deep-ep")
ROWS: list[dict[str, Any]] = []
SEEN: dict[str, dict[str, Any]] = {}
"""By test."""

See = Callable[..., None]
"""``seen("sentence", figure=..., ...)``."""


def note(test: str, feature: str, what: str, figures: dict[str, Any]) -> None:
    """A sentence for people, with figures; printed at once, since commands may be cut short."""
    SEEN[test] = {"what": what, **figures}
    print(json.dumps({"feature": feature, "test": test, "seen": SEEN[test]}), flush=True)


def outcome(item: pytest.Item, report: pytest.TestReport) -> None:
    """Take note of a test's end and write the file anew."""
    if report.when != "call" and report.passed:
        return
    reason = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash else str(report.longrepr)
        reason = text.strip().splitlines()[0][:300]
    row = {
        "feature": item.module.FEATURE,  # type: ignore[attr-defined]
        "test": item.name,
        "outcome": report.outcome,
        "reason": reason,
        "seconds": round(report.duration, 1),
        "seen": SEEN.get(item.name, {}),
    }
    ROWS.append(row)
    OUT.mkdir(parents=True, exist_ok=True)
    new = OUT / f".{os.getpid()}.json"
    command = " ".join(["pytest", *(_short(word) for word in sys.argv[1:])])
    record = {"environment": environment(), "commands": [command], "features": ROWS}
    new.write_text(json.dumps(record, indent=1))
    new.replace(OUT / f"features-{os.getpid()}.json")  # whole, for whoever reads meanwhile


def _short(word: str) -> str:
    """Paths by their names: a record holds none of the machine."""
    return Path(word).name if word.startswith("/") else word


def environment() -> dict[str, str]:
    """Device, date and versions."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": str(torch.cuda.device_count()),
        "date": datetime.date.today().isoformat(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
