"""`--enable-mixed-chunk`: filled where it was seen to pay, left where something speaks against."""

from __future__ import annotations

import pytest

from ..support.resolving import LL, Launch

NO_PREFILL_GRAPHS = '{"prefill": {"backend": "disabled"}}'
DP8 = ("--tp-size", "8", "--attn-dp-size", "8")


@pytest.mark.parametrize(
    ("model", "flags", "env", "mixed"),
    [
        ("qwen3", (*DP8, "--use-batched-dp-moe", "on"), {}, True),
        ("qwen3", (*DP8, *LL), {}, True),
        ("qwen3", (*DP8, *LL), {"MOE_PLUGIN_MIXED_CHUNKS": "0"}, False),
        ("qwen3", (*DP8, *LL, "--enable-mixed-chunk"), {"MOE_PLUGIN_MIXED_CHUNKS": "0"}, True),
        ("qwen3", (*DP8, *LL, "--enable-deterministic-inference"), {}, False),
        ("qwen3", (*DP8, *LL, "--rl-on-policy-target", "fsdp"), {}, False),
        ("qwen3", (*DP8, *LL, "--batched-dp-moe-max-tokens", "256"), {}, False),
        ("qwen3", (*DP8, *LL, "--cuda-graph-config", NO_PREFILL_GRAPHS), {}, False),
        ("qwen3", (*DP8, *LL, "--moe-dense-tp-size", "8"), {}, False),
        ("qwen3", ("--tp-size", "8", *LL), {}, False),
        ("deepseek-v3", (*DP8, *LL), {}, False),
    ],
)
def test_mixed_chunks_are_filled_where_they_pay(
    launch: Launch, model: str, flags: tuple[str, ...], env: dict[str, str], mixed: bool
) -> None:
    """And the plan says so, with running requests that leave half a chunk."""
    answer = launch(*flags, model=model, env=env)
    assert answer["ok"], answer.get("error")
    assert answer["resolved"]["enable_mixed_chunk"] is mixed
    plan = answer["plan"]
    assert plan["mixed_chunk"] is mixed
    if mixed:
        assert plan["max_running_requests"] <= plan["chunked_prefill_size"] // 2
