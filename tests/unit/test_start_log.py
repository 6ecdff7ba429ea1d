"""The lines of a plan that a server logs."""

from __future__ import annotations

from dataclasses import replace

from moe_plugin import Capability
from moe_plugin.planning.memory_record import GIB, Memory
from moe_plugin.planning.plan import Budget, Plan
from moe_plugin.planning.start_log import binding, bytes_of_a_rank, why_tokens

TOKENS = Budget("max_dispatch_tokens_per_rank", 256, "user", "<= 1024 (cap)", 768, "typed")
CHUNK = Budget("chunked_prefill_size", 1024, "derived", "<= 1024 (T x DP)", 0, "1024 // 4")
QUEUES = Budget("nvshmem_qp_depth", 514, "derived", ">= 514", None, "2 x 257")
PLAN = Plan(
    capability=Capability(True, ""),
    rdma_device_bytes=6 * GIB,
    workspace_bytes=GIB,
    budgets=(CHUNK, TOKENS, QUEUES),
)
MEMORY = Memory(
    device_bytes=80 * GIB,
    usable_bytes=78 * GIB,
    weights_bytes=9 * GIB,
    weights_source="config.json",
    buffer_bytes=6 * GIB,
    workspace_bytes=2 * GIB,
    graphs_bytes=0,
    activations_bytes=0,
    mem_fraction_static=0.75,
    kv_token_bytes=GIB,
    stock_fraction=0.8,
    stock_kv_bytes=48 * GIB,
    host_fraction=0.7,
    kv_cache_bytes=49 * GIB,
    kv_cache_tokens=49,
)


def test_t_has_a_reason_and_only_full_budgets_bind() -> None:
    assert why_tokens(PLAN) == "typed"
    assert binding(PLAN) == ["chunked_prefill_size <= 1024 (T x DP)"]


def test_what_is_left_as_far_as_it_is_known() -> None:
    """Workspaces of every pool, where the memory is known."""
    assert bytes_of_a_rank(PLAN) == "6.00 GiB of buffer, 1.00 GiB of workspace"
    known = "6.00 GiB of buffer, 2.00 GiB of workspace, "
    assert bytes_of_a_rank(replace(PLAN, memory=MEMORY)) == (
        known + "9.00 GiB of weights, 49.00 GiB left for the KV cache, 49 tokens"
    )
    unknown = replace(MEMORY, weights_source="")
    assert bytes_of_a_rank(replace(PLAN, memory=unknown)) == (
        known + "49.00 GiB left for weights and KV cache"
    )
