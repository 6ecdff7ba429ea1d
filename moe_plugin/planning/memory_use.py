"""What a plan takes of the device's memory, and whether that fits."""

from __future__ import annotations

import math
from dataclasses import replace

from .device_memory import (
    Runtime,
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
from .integers import floor_to
from .memory_record import Memory, MemoryFacts
from .plan import Plan

LEAST_FRACTION = 0.05
"""Below this there is no room for weights and KV cache, whatever they are."""
USEFUL_SHARE = 32
"""A KV cache of less than one 32nd of the device serves hardly more than one long request."""
UNKNOWN_WEIGHTS = 4
"""Beside weights of unknown size one part of so many is taken to be left, where that decides."""


def memory_of(plan: Plan, model: ModelFacts, launch: LaunchFacts, *, lean: bool = False) -> Memory:
    """The memory of a plan; with ``lean`` at the least that runs instead of by the host's rule."""
    facts = facts_of(launch)
    workspace = pools(plan, launch) * plan.workspace_bytes
    host = _host_fraction(plan, launch, facts)
    towers = 0
    if facts.fraction is None:
        towers = math.ceil(facts.usable_bytes * host * (1 - facts.tower_factor))
    weights, loading, stock_weights = _weights(model, launch, facts)
    stock = round(1 - stock_kept(launch, facts) / facts.device_bytes, 3) * facts.tower_factor
    stock_fraction = stock if facts.fraction is None else facts.fraction
    stock_kv = int(facts.usable_bytes * stock_fraction) - stock_weights - facts.stock_media_bytes
    used, fraction = _fraction(
        facts,
        planned_rule(plan, launch, facts, launch.draft_width),
        least_runtime(plan, launch, facts, model.weights, model.context_length),
        ours=plan.rdma_device_bytes + workspace + towers,
        like_stock=stock_kv + weights + facts.media_bytes,
        lean=lean,
    )
    left = int(facts.usable_bytes * fraction) - weights - facts.media_bytes
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
        kv_token_bytes=kv_token_bytes(model, launch, facts),
        stock_fraction=stock,
        stock_kv_bytes=stock_kv,
        host_fraction=host * facts.tower_factor,
        loading_bytes=loading,
        towers_bytes=towers,
        media_bytes=facts.media_bytes,
        kv_token_cap=facts.kv_token_cap,
    )
    return memory.with_room(left)


def _host_fraction(plan: Plan, launch: LaunchFacts, facts: MemoryFacts) -> float:
    """What the host will choose for the planned budgets, before it thinks of towers."""
    prefill = plan.cuda_graph_max_bs_prefill if launch.prefill_graphs else 0
    rule = planned_rule(plan, launch, facts, launch.typed_draft_tokens)
    return round(1 - with_guess(launch, facts, rule, prefill) / facts.device_bytes, 3)


def _weights(
    model: ModelFacts, launch: LaunchFacts, facts: MemoryFacts
) -> tuple[int, int, int]:  # fmt: skip
    """Bytes of a rank's weights, while they are loaded, and under the stock host's flags."""
    if model.weights is None:
        return 0, 0, 0
    ours, stock = topology(launch, facts), stock_topology(launch, facts)
    return (
        model.weights.per_rank(ours) + draft_bytes(facts, ours),
        model.weights.loading_per_rank(ours),
        model.weights.per_rank(stock) + draft_bytes(facts, stock),
    )


def _fraction(
    facts: MemoryFacts, rule: Runtime, least: Runtime, *, ours: int, like_stock: int, lean: bool
) -> tuple[Runtime, float]:
    """What is kept for activations and graphs, and the fraction that leaves it.

    Args:
        facts: of the device; with the fraction, where one is typed.
        rule: activations and graphs by the host's rule.
        least: those that run.
        ours: bytes of the plugin's, and of towers.
        like_stock: weights and a KV cache as large as the stock host's. There is never less, as far
            as what runs allows it.
        lean: keep the least that runs.
    """
    if facts.fraction is not None:
        return least, facts.fraction
    leanest = rounded_fraction(sum(least) + ours, facts)
    if lean:
        return least, leanest
    by_rule = rounded_fraction(above_floor(sum(rule), facts) + ours, facts)
    alike = math.ceil(like_stock / facts.usable_bytes * 1000 - 1e-6) / 1000
    fraction = max(by_rule, min(alike, leanest))
    return (rule if fraction == by_rule else least), fraction


def kv_token_bytes(model: ModelFacts, launch: LaunchFacts, facts: MemoryFacts) -> int | None:
    """KV cache of one token on one rank; None where it is not known."""
    if model.weights is None or not facts.tokens_alike:
        return None
    divided = topology(launch, facts)
    return model.weights.kv_token_bytes(divided, facts.kv_element, facts.mla_row)


def recounted(
    memory: Memory, model: ModelFacts, launch: LaunchFacts, facts: MemoryFacts | None
) -> Memory:
    """``memory`` in tokens of the KV cache as the host has it in the end: its dtype, and how inputs
    of towers come to the device, are decided after its bytes."""
    if facts is None:
        return memory
    token = kv_token_bytes(model, launch, facts)
    room = memory.kv_room_bytes + memory.media_bytes - facts.media_bytes
    return replace(memory, kv_token_bytes=token, media_bytes=facts.media_bytes).with_room(room)


def states_room(
    memory: Memory | None, launch: LaunchFacts, state_bytes: int, state_share: float
) -> int | None:
    """Running requests of a DP group whose states of linear attention take what the host would give
    them by itself; None where their number does not decide about states, or is typed.

    One more state is the pool's own, and with speculation each has one more for every draft token.
    Weights that are not known are taken for most of what there is.
    """
    if memory is None or not state_bytes or launch.max_running_requests is not None:
        return None
    room = memory.kv_room_bytes // (1 if memory.weights_source else UNKNOWN_WEIGHTS)
    drafts = launch.draft_width if launch.draft_width > 1 else 0
    states = int(max(0, room) * state_share) // (state_bytes * (1 + drafts)) - 1
    fitting = (m for m in (launch.graph_multiple, launch.capture_multiple) if m <= states)
    return max(1, floor_to(states, next(fitting, 1)))


def needed(memory: Memory) -> int:
    """Bytes of a plan that come out of the reserve, beside the KV cache."""
    parts = (memory.buffer_bytes, memory.workspace_bytes, memory.graphs_bytes)
    return sum(parts) + memory.activations_bytes + memory.multimodal_bytes


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
