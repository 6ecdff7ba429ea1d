"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from .serving.checkpoint import write_checkpoint
from .serving.prompts import NEW_TOKENS, PROMPTS
from .serving.server import COMMON_ARGS, Server

STOCK = {"SGLANG_PLUGINS": "moe_plugin_cpu"}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that every CPU server serves."""
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def stock(model: Path) -> list[dict]:
    """Answers of the stock host to PROMPTS: one rank, no all-to-all, without the plugin."""
    with Server(COMMON_ARGS, model, env=STOCK) as server:
        server.wait_ready()
        assert server.states() == []  # SGLANG_PLUGINS without us: the host as it was
        return server.generate_many(PROMPTS, NEW_TOKENS)
