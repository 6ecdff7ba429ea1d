"""The plan made here for a named device equals the one that was live on such a device."""

from __future__ import annotations

import json
from pathlib import Path

from ..support.serving.checkpoint import QWEN3_30B_LAYERS, write_config
from .test_cli import plan_json

RECORD = Path(__file__).parents[2] / "benchmarks/results/2026-11-23-h200-serving-start.json"
GRANULE = 512 << 20
HANDLE = 131_072 + 1_024 + 512
"""What a dispatch returns beside its rows, left out in the record, bytes: a source index of 32,768
rows, 128 ranges, and 128 counts in a block of the allocator's."""
ALLOCATOR = 3 << 20
"""A MiB for each of three large tensors, likewise: the allocator does not split off less."""
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
    # The buffer's fixed cost was not known when the record was made: it is what it measured.
    told, taken = live.pop("rdma_device_bytes"), state["buffer_device_bytes"]
    assert told < taken <= planned["rdma_device_bytes"] <= taken + GRANULE
    # Nor was the workspace whole; it is reserved twice, and since then the buffer beside it.
    workspace, reserved = live.pop("workspace_bytes"), live.pop("reserved_bytes")
    grown = planned["workspace_bytes"] - workspace
    assert grown == HANDLE + ALLOCATOR
    assert reserved == 2 * workspace
    assert planned["reserved_bytes"] == reserved + 2 * grown + planned["rdma_device_bytes"]
    assert {name: planned[name] for name in live} == live
