"""The plan made here for a named device equals the one that was live on such a device."""

from __future__ import annotations

import json
from pathlib import Path

from moe_plugin.planning.memory import UNSPLIT, allocated, handle_sizes

from ..support.serving.checkpoint import QWEN3_30B_LAYERS, write_config
from .test_cli import plan_json

RECORD = Path(__file__).parents[2] / "benchmarks/results/2026-11-23-h200-serving-start.json"
GRANULE = 512 << 20
TOKENS = "--batched-dp-moe-max-tokens"


def test_plan_for_an_h200_equals_the_live_one(tmp_path: Path) -> None:
    """Same flags, a config.json and no GPU here; the server of the record ran on the device."""
    model = write_config(tmp_path, QWEN3_30B_LAYERS, "bfloat16")
    argv = ["--target", "h200", "--model-path", str(model), "--use-batched-dp-moe", "on"]
    argv += [TOKENS, "256"]
    code, planned = plan_json(*argv, "--attention-backend", "triton", "--sampling-backend=pytorch")
    assert code == 0
    (state,) = json.loads(RECORD.read_text())["states"]
    live = state["plan"]
    taken = live.pop("rdma_device_bytes"), state["buffer_device_bytes"]
    # The record left out what a dispatch returns beside its rows, and what the allocator adds to
    # three tensors.
    experts = live["num_experts"]
    rows = experts * live["max_dispatch_tokens_per_rank"]
    live["workspace_bytes"] += sum(map(allocated, handle_sizes(rows, experts, experts)))
    live["workspace_bytes"] += 3 * UNSPLIT
    # The record's buffer was created before the KV cache, and its T by default.
    live["reserved_bytes"] = 2 * live["workspace_bytes"] + planned["rdma_device_bytes"]
    live["budgets"][0] |= {"source": "user", "arithmetic": f"from {TOKENS}"}
    assert {name: planned[name] for name in live} == live
    # The fixed cost was not known when the record was made: it is what the record measured.
    assert taken[0] < taken[1] <= planned["rdma_device_bytes"] <= taken[1] + GRANULE
