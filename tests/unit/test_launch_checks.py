"""What the checks of random launches let pass, and what not."""

from __future__ import annotations

from typing import Any

import pytest

from ..support import launch_checks

GIB = 1 << 30
LAUNCH = {"flags": {"--tp-size": "8"}, "env": {}}


def answer(**memory: int) -> dict[str, Any]:
    """A plan of these bytes, at the host's own T, where the host's rule has 4 GiB for what runs."""
    parts = {"buffer_bytes": GIB, "workspace_bytes": 0, "activations_bytes": 0, "graphs_bytes": 0}
    plan = {
        "memory": {**parts, **memory},
        "capability": {"backend": "deepep", "modes": []},
        "transport": "torch",
        "max_dispatch_tokens_per_rank": 128,
        "token_multiple": 8,
        "num_experts": 128,
        "hidden_size": 4096,
        "attn_tp_size": 1,
    }
    built = {"layers": [{"inter": 1024}]}
    return {"plan": plan, "built": built, "runs": 4 * GIB, "rows": {}}


@pytest.mark.parametrize(
    ("memory", "needed"),
    [
        ({"activations_bytes": GIB, "graphs_bytes": GIB}, 3 * GIB),
        ({"activations_bytes": 20 * GIB, "graphs_bytes": GIB}, 5 * GIB),
        ({"workspace_bytes": GIB // 4}, GIB + GIB // 4),
        ({"workspace_bytes": 20 * GIB}, GIB + 4 * 128 * 128 * (2 * 4096 + 3 * 1024)),
    ],
)
def test_an_estimate_that_is_too_high_excuses_no_smaller_kv_cache(
    memory: dict[str, int], needed: int
) -> None:
    """The excuse ends at the host's own rule, and at the rows of two pools."""
    assert launch_checks._needed_of_slack(LAUNCH, answer(**memory)) == needed


def test_a_launch_left_alone_for_memory_has_to_start() -> None:
    """On the stock host: rows that it captures beyond its T are a fault."""
    stock = {
        "ok": True,
        "resolved": {"moe_a2a_backend": "deepep", "mem_fraction_static": 0.8},
        "built": {"error": "", "layers": [], "weights": 0, "device": 80 * GIB, "hidden": 4096},
        "prefill": {"backend": "disabled"},
        "layout": {"builds": True, "batched": {"decode": True}},
        "rows": {"decode": 2048, "decode_graph": 256},
    }
    launch = {**LAUNCH, "model": "qwen3-235b/bf16/few"}
    (fault,) = launch_checks._fails_alone(launch, lambda *_, **__: stock)
    assert "decode_graph 256 > 128" in fault
    assert "decode 2048" not in fault
