"""The record of what was seen."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from . import records


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> records.See:
    """``seen("what people should know", figure=1.5)``."""

    def note(what: str, **figures: Any) -> None:
        records.note(request.node.name, request.module.FEATURE, what, figures)

    return note


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Every outcome of a feature is recorded, also a failure and a skip."""
    report = yield
    if hasattr(getattr(item, "module", None), "FEATURE"):
        records.outcome(item, report)
    return report
