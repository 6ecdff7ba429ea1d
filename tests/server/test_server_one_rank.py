"""End to end on CPU with one rank, and what happens without the budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.hosts import host_script_result
from ..support.rank_killed import EXIT_LIMIT_S, NO_CORE_DUMPS
from ..support.serving.checkpoint import Shape
from ..support.serving.compare import check_equal, uncounted_layers
from ..support.serving.fixture_plugin import write_plugin
from ..support.serving.prompts import LONG_PROMPT, NEW_TOKENS, PROMPTS
from ..support.serving.server import COMMON_ARGS, LAUNCH_SERVER, Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

BUDGET = 256
ON = (*COMMON_ARGS, "--use-batched-dp-moe", "on")

# The plugin with its budgets left out: same transport, same experts, nothing filled or checked.
NO_BUDGETS = """
def register():
    from moe_plugin.integration.resolve import hooks
    hooks.fills_of = lambda server_args, plan: {}
    hooks.verify = lambda server_args, plan: plan
"""


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
    env = write_plugin(tmp_path, "no_budgets", NO_BUDGETS, {"sglang.srt.plugins": "register"})
    with Server(ON, model, env=env | NO_CORE_DUMPS) as server:
        server.wait_ready()
        server.generate(PROMPTS[0], 4)  # short prompts are served, as they are today
        with pytest.raises(OSError):
            server.generate(LONG_PROMPT, 4)
        assert server.wait_exit(EXIT_LIMIT_S) != 0
        log = server.log()
    assert "tokens in one all-to-all dispatch (n <= T): got" in log
    assert f"allowed <= {BUDGET}" in log


ENGINE = """
if __name__ == "__main__":
    import sglang
    engine = sglang.Engine(
        model_path={model!r}, device="cpu", dtype="float32", attention_backend="torch_native",
        sampling_backend="pytorch", max_total_tokens=8192, context_length=2048,
        disable_radix_cache=True, random_seed=0, log_level="warning",
    )
    sampling = {{"temperature": 0, "max_new_tokens": {tokens}, "ignore_eos": True}}
    answer = engine.generate({prompt!r}, sampling, return_logprob=True)
    (state,) = [s["moe_plugin"] for s in engine.get_server_info()["internal_states"]]
    engine.shutdown()
    emit([[p[1] for p in answer["meta_info"]["output_token_logprobs"]], state["layer_forwards"]])
"""


def test_engine_equals_the_stock_host(model: Path, stock: list[dict], tmp_path: Path) -> None:
    """`sglang.Engine` has no command line: one variable switches the plugin on."""
    code = ENGINE.format(model=str(model), prompt=PROMPTS[0], tokens=NEW_TOKENS)
    env = {"MOE_PLUGIN_USE_BATCHED_DP_MOE": "on", "HF_HUB_OFFLINE": "1"}
    tokens, forwards = host_script_result(code, tmp_path, env=env)
    assert tokens == stock[0]["tokens"]
    assert min(forwards.values()) >= NEW_TOKENS
