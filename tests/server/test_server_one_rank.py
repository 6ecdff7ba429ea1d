"""End to end on CPU with one rank, and what happens without the budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.hosts import host_result, program
from ..support.rank_killed import EXIT_LIMIT_S, NO_CORE_DUMPS
from ..support.serving.checkpoint import Shape
from ..support.serving.compare import check_equal, uncounted_layers
from ..support.serving.fixture_plugin import write_plugin
from ..support.serving.prompts import LONG_PROMPT, NEW_TOKENS, PROMPTS
from ..support.serving.server import COMMON_ARGS, LAUNCH_SERVER, Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

BUDGET = 256
ON = (*COMMON_ARGS, "--use-batched-dp-moe", "on")


def test_one_rank_equals_the_stock_host(model: Path, stock: list[dict]) -> None:
    """The capability asks for neither DP nor EP; and the older way of starting works as well."""
    with Server(ON, model, command=LAUNCH_SERVER) as server:
        server.wait_ready()
        check_equal(server.generate_many(PROMPTS, NEW_TOKENS), stock)
        (state,) = server.states()
        assert uncounted_layers([state], Shape().num_hidden_layers) == []
        assert max(state["max_rows"].values()) <= BUDGET


def test_without_budgets_the_same_launch_dies(model: Path, tmp_path: Path) -> None:
    """A/B: everything equal but the budgets; the long prompt then ends the server at n <= T."""
    env = write_plugin(
        tmp_path, "no_budgets", program("plugin_no_budgets"), {"sglang.srt.plugins": "register"}
    )
    with Server(ON, model, env=env | NO_CORE_DUMPS) as server:
        server.wait_ready()
        server.generate(PROMPTS[0], 4)  # short prompts are served, as they are today
        with pytest.raises(OSError):
            server.generate(LONG_PROMPT, 4)
        assert server.wait_exit(EXIT_LIMIT_S) != 0
        log = server.log()
    assert "tokens in one all-to-all dispatch (n <= T): got" in log
    assert f"allowed <= {BUDGET}" in log


def test_engine_equals_the_stock_host(model: Path, stock: list[dict]) -> None:
    """`sglang.Engine` has no command line: one variable switches the plugin on."""
    env = {"MOE_PLUGIN_USE_BATCHED_DP_MOE": "on", "HF_HUB_OFFLINE": "1"}
    asked = (str(model), PROMPTS[0], NEW_TOKENS)
    tokens, forwards = host_result(program("offline_engine"), *asked, env=env)
    assert tokens == stock[0]["tokens"]
    assert min(forwards.values()) >= NEW_TOKENS
