"""A rank that is killed in mid-run ends the server with a clear message; it does not hang."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.hosts import program
from ..support.rank_killed import NO_CORE_DUMPS, check_killed_rank_ends_the_server
from ..support.server_checks import (
    check_idle_ranks,
    check_mixed_prompts,
    check_steps,
    check_unequal_load,
    check_within_plan,
    forced_logprobs,
    mean_distance,
)
from ..support.serving.checkpoint import Shape
from ..support.serving.fixture_plugin import write_plugin
from ..support.serving.prompts import SHORT_PROMPTS
from ..support.serving.server import COMMON_ARGS, TWO_EP_RANKS, Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]


def test_any_load_then_a_killed_rank(model: Path, tmp_path: Path) -> None:
    """Two CPU ranks; the other one waits for its peer as it would in a GPU kernel.

    The checks before are those of the test on several GPUs, on a few requests.
    """
    source = program("plugin_waiting_peers")
    env = write_plugin(tmp_path, "waiting", source, {"sglang.srt.plugins": "register"})
    args = (*COMMON_ARGS, *TWO_EP_RANKS, "--use-batched-dp-moe", "on")
    with Server(args, model, ranks=2, env=env | NO_CORE_DUMPS) as server:
        server.wait_ready()
        check_mixed_prompts(server, 8, (1, 63, 257, 600), 4)
        check_idle_ranks(server, 4)
        check_unequal_load(server, 2, 600, 4)
        check_within_plan(server, 2, Shape().num_hidden_layers)
        check_steps(server, replayed=False)
        forced = forced_logprobs(server, SHORT_PROMPTS[:1])
        assert mean_distance(forced, forced_logprobs(server, SHORT_PROMPTS[:1])) < 1e-4
        seconds = check_killed_rank_ends_the_server(server, ranks=2, peers_hang=True)
        assert "this rank waits for ever after" in server.log()
    assert seconds < 60
