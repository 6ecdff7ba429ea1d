"""End to end on CPU with int4 experts in their real format on disk, loaded by the host's loader."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_plugin.kernels.formats import FORMATS

from ..conftest import STOCK
from ..support.hosts import program
from ..support.serving.checkpoint import Shape
from ..support.serving.compare import check_equal, uncounted_layers
from ..support.serving.fixture_plugin import write_plugin
from ..support.serving.prompts import NEW_TOKENS, PROMPTS
from ..support.serving.quantised_checkpoint import write_quantised
from ..support.serving.server import COMMON_ARGS, Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

ON = (*COMMON_ARGS, "--use-batched-dp-moe", "on")


@pytest.mark.parametrize("name", ["int4_g32", "int4_g128"])
def test_int4_experts_equal_the_stock_host_on_what_they_stand_for(
    name: str, model: Path, tmp_path: Path
) -> None:
    packed, plain = write_quantised(model, tmp_path, FORMATS[name])
    with Server(COMMON_ARGS, plain, env=STOCK) as server:
        expected = server.wait_ready().generate_many(PROMPTS, NEW_TOKENS)
    env = write_plugin(
        tmp_path / "more", "float32", program("plugin_float32_int4"),
        {"sglang.srt.plugins": "register"},
    )  # fmt: skip
    with Server(ON, packed, env=env) as server:
        check_equal(server.wait_ready().generate_many(PROMPTS, NEW_TOKENS), expected)
        for path in ("/begin_weight_update", "/end_weight_update"):  # which sends nothing
            done = server.post(path, {})
            assert done["success"], (path, done)
        check_equal(server.generate_many(PROMPTS, NEW_TOKENS), expected)
        (state,) = server.states()
        assert uncounted_layers([state], Shape().num_hidden_layers) == []
