"""Models that several modules serve; a checkpoint is written once on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.serving.shared_models import shared_model
from .launches import MODEL


@pytest.fixture(scope="session")
def model() -> Path:
    """Four of Qwen3-30B-A3B's layers with random weights, in bf16."""
    return shared_model(MODEL)
