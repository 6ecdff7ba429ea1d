"""What a plan takes of the device's memory, and whether that fits."""

from __future__ import annotations

import math
from dataclasses import replace

from .device_memory import (
    above_floor,
    draft_bytes,
    least_runtime,
    planned_rule,
    pools,
    rounded_fraction,
    stock_kept,
    stock_topology,
    topology,
    with_guess,
)
from .facts import LaunchFacts, ModelFacts
from .memory_record import Memory, MemoryFacts
from .plan import Plan

LEAST_FRACTION = 0.05
"""Below this there is no room for weights and KV cache, whatever they are."""
USEFUL_SHARE = 32
"""A KV cache of less than one 32nd of the device serves hardly more than one long request."""


def memory_of(plan: Plan, model: ModelFacts, launch: LaunchFacts, *, lean: bool = False) -> Memory:
    """The memory of a plan; with ``lean`` at the least that runs instead of by the host's rule."""
    facts = facts_of(launch)
    rule = planned_rule(plan, launch, facts, launch.draft_width)
    least = least_runtime(plan, launch, facts, model.weights, model.context_length)
    workspace = pools(plan, launch) * plan.workspace_bytes
    ours = plan.rdma_device_bytes + workspace
    by_rule = above_floor(sum(rule), facts) + ours
    stock = 1 - stock_kept(launch, facts) / facts.device_bytes
    leanest = rounded_fraction(sum(least) + ours, facts)
    weights = token = stock_weights = loading = 0
    if model.weights is not None:
        divided, alone = topology(launch, facts), stock_topology(launch, facts)
        weights = model.weights.per_rank(divided) + draft_bytes(facts, divided)
        loading = model.weights.loading_per_rank(divided)
        stock_weights = model.weights.per_rank(alone) + draft_bytes(facts, alone)
        token = kv_token_bytes(model, launch, facts)
    theirs = facts.fraction if facts.fraction is not None else round(stock, 3)
    stock_kv = int(facts.usable_bytes * theirs) - stock_weights
    used, fraction = least, leanest
    if facts.fraction is not None:
        fraction = facts.fraction
    elif not lean:
        # Never less for the KV cache than the stock host leaves, as far as what runs allows it.
        alike = math.ceil((stock_kv + weights) / facts.usable_bytes * 1000 - 1e-6) / 1000
        fraction = max(rounded_fraction(by_rule, facts), min(alike, leanest))
        used = rule if fraction == rounded_fraction(by_rule, facts) else least
    left = int(facts.usable_bytes * fraction) - weights
    prefill = plan.cuda_graph_max_bs_prefill if launch.prefill_graphs else 0
    hosts = planned_rule(plan, launch, facts, launch.typed_draft_tokens)
    host = with_guess(launch, facts, hosts, prefill)
    memory = Memory(
        device_bytes=facts.device_bytes,
        usable_bytes=facts.usable_bytes,
        weights_bytes=weights,
        weights_source=model.weights.source if model.weights else "",
        buffer_bytes=plan.rdma_device_bytes,
        workspace_bytes=workspace,
        graphs_bytes=used.graphs,
        activations_bytes=used.activations,
        mem_fraction_static=fraction,
        kv_token_bytes=token,
        stock_fraction=round(stock, 3),
        stock_kv_bytes=stock_kv,
        host_fraction=round(1 - host / facts.device_bytes, 3),
        loading_bytes=loading,
        kv_token_cap=facts.kv_token_cap,
    )
    return memory.with_room(left)


def kv_token_bytes(model: ModelFacts, launch: LaunchFacts, facts: MemoryFacts) -> int:
    """KV cache of one token on one rank; 0 where it is not known."""
    if model.weights is None:
        return 0
    divided = topology(launch, facts)
    return model.weights.kv_token_bytes(divided, facts.kv_element, facts.mla_row)


def recounted(
    memory: Memory, model: ModelFacts, launch: LaunchFacts, facts: MemoryFacts | None
) -> Memory:
    """``memory`` in tokens of the KV cache as the host has it in the end: its dtype is decided
    after its bytes."""
    if facts is None:
        return memory
    token = kv_token_bytes(model, launch, facts)
    return replace(memory, kv_token_bytes=token).with_room(memory.kv_room_bytes)


def needed(memory: Memory) -> int:
    """Bytes of a plan that come out of the reserve, beside the KV cache."""
    parts = (memory.buffer_bytes, memory.workspace_bytes, memory.graphs_bytes)
    return sum(parts) + memory.activations_bytes


def kept_back(memory: Memory) -> int:
    """What is left beside weights and KV cache."""
    return memory.usable_bytes - memory.weights_bytes - memory.kv_cache_bytes


def fits(memory: Memory, typed: float | None) -> bool:
    """Whether the launch starts, with a useful KV cache; a typed fraction may leave any."""
    if memory.mem_fraction_static < LEAST_FRACTION or memory.loading_bytes > memory.usable_bytes:
        return False
    if typed is not None:
        return memory.kv_cache_bytes > 0 and needed(memory) <= kept_back(memory)
    if not memory.weights_source:
        return True
    return memory.kv_room_bytes >= memory.device_bytes // USEFUL_SHARE


def facts_of(launch: LaunchFacts) -> MemoryFacts:
    """Of a launch whose device's memory is known."""
    assert launch.memory is not None
    return launch.memory
