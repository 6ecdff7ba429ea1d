"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .support.resolving import Launch, Worker, write_models
from .support.serving.checkpoint import write_checkpoint
from .support.serving.prompts import NEW_TOKENS, PROMPTS
from .support.serving.server import COMMON_ARGS, Server

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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model directories, by name. A module with models of its own defines this again."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def worker(models: dict[str, str]) -> Iterator[Worker]:
    """One process with the plugin's hooks, answering for an H100."""
    process = Worker(models["qwen3"])
    yield process
    process.close()


@pytest.fixture
def launch(worker: Worker, models: dict[str, str]) -> Launch:
    """``launch("--tp-size", "8", ...)`` -> answer."""
    return Launch(worker, models)
