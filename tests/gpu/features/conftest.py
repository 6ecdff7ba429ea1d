"""Models, and the record of what was seen."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from ...support.serving.checkpoint import Shape, write_checkpoint
from ...support.serving.shared_models import shared_model
from . import records
from .machine import ON_CPU


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of Qwen3-30B-A3B's layers in bf16; on a CPU a smaller model."""
    if ON_CPU:
        return write_checkpoint(tmp_path_factory.mktemp("model"), Shape(num_key_value_heads=4))
    return shared_model("qwen3-bf16-4")


@pytest.fixture(scope="session")
def qwen3_other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    if ON_CPU:
        folder = tmp_path_factory.mktemp("other")
        return write_checkpoint(folder, Shape(num_key_value_heads=4), seed=1)
    return shared_model("qwen3-bf16-4-other")


@pytest.fixture(scope="session")
def deepseek() -> Path:
    """DeepSeek-V3's shape in FP8: three layers, 32 experts and a NextN layer."""
    if ON_CPU:
        pytest.skip("requires GPUs: MLA and FP8")
    return shared_model("deepseek-v3-nextn")


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
