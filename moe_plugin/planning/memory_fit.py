"""Fit a plan into device memory: T and decode graphs shrink, or T grows, as memory allows.

A launch is refused only if nothing fits, with every single change that would help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from .device_memory import stock_graph
from .facts import LaunchFacts, ModelFacts
from .limits import DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP, HOST_TOKENS_PER_RANK
from .memory import gib
from .memory_record import Memory
from .memory_use import facts_of, fits, memory_of, states_room
from .plan import T_NAME, Plan

GRAPH_CAPS = (512, 256, 128, 64, 32)
"""Largest decode graphs that are tried, in this order, where what T allows is too much."""
SMALLER = (128, 64)
LARGER = (1024, 512)
LEAST_TOKENS = 64


class Try(NamedTuple):
    """What a plan may be, to fit.

    Attributes:
        least_tokens: the smallest T.
        lean: what is kept for graphs and activations is the least that runs.
        like_stock: its KV cache is as large as the stock host's.
    """

    least_tokens: int
    lean: bool
    like_stock: bool


TRIES = (
    Try(128, lean=False, like_stock=True),
    Try(128, lean=False, like_stock=False),
    Try(128, lean=True, like_stock=False),
    Try(LEAST_TOKENS, lean=False, like_stock=False),
    Try(LEAST_TOKENS, lean=True, like_stock=False),
)
"""In this order."""
DECODES_ONLY = f"decode rows only: what the values below need, at least {LEAST_TOKENS}"
GROWTH_SHARE = 10
"""T grows where its bytes take at most one tenth of the KV cache that the default would leave."""

Build = Callable[[LaunchFacts], Plan]
"""Plans the same launch, with other defaults."""


def settle(build: Build, model: ModelFacts, launch: LaunchFacts) -> tuple[Plan, bool]:
    """The plan that memory allows, and whether it fits: with graphs or T smaller than they would
    be by themselves, or with T larger where that costs little. What the user typed stays."""
    plan, fitting = _settled(build, model, launch)
    if (facts := launch.memory) is None:
        return plan, fitting
    most = states_room(plan.memory, launch, facts.state_bytes, facts.state_share)
    if most is None or plan.max_running_requests <= most * launch.attn_dp_size:
        return plan, fitting
    return _settled(build, model, replace(launch, running_cap=most))


def _settled(build: Build, model: ModelFacts, launch: LaunchFacts) -> tuple[Plan, bool]:
    if launch.memory is None:
        return build(launch), True
    decided = launch.default_tokens is not None  # asked before
    start = launch if decided else replace(launch, default_tokens=_by_role(build, launch))
    first = build(start)
    free = not decided and _tokens_source(first) != "user"
    typed = launch.memory.fraction
    for smallest, lean, like_stock in TRIES:
        fitting = (
            replace(plan, memory=held)
            for changed, plan in _candidates(first, build, start, free, smallest)
            if fits(held := memory_of(plan, model, changed, lean=lean), typed)
            and not (plan.errors and not first.errors)
            and not (like_stock and typed is None and held.less_than_stock)
        )
        found = next(fitting, None)
        if found is None:
            continue
        memory = _memory(found)
        if typed is None and memory.less_than_stock:
            found = min((found, *fitting), key=_beyond_stock(launch))
        if found.max_dispatch_tokens_per_rank < first.max_dispatch_tokens_per_rank:
            found = _worth_it(found, first, build, model, start)
        elif free and start.default_tokens is None and not lean and memory.weights_source:
            found = _grown(found, build, model, launch)
        elif start.default_tokens is not None and not decided:
            found = _because(found, DECODES_ONLY)
        return found, True
    return replace(first, memory=memory_of(first, model, start, lean=True)), False


def _by_role(build: Build, launch: LaunchFacts) -> int | None:
    """Where only decode rows are dispatched, T is what their number needs."""
    plan = build(launch)
    prefills = plan.bounds_prefill and launch.disaggregation_mode != "decode"
    running = launch.max_running_requests
    # A cap that T does not carry is lowered to what it does, and says nothing about their number.
    known = running is not None and plan.max_running_requests == running
    return LEAST_TOKENS if known and not prefills else None


def _tokens_source(plan: Plan) -> str:
    return next((b.source for b in plan.budgets if b.name == T_NAME), "")


def _because(plan: Plan, reason: str) -> Plan:
    """``plan`` with the reason for its T beside it."""
    budgets = [
        replace(budget, source="derived", arithmetic=reason) if budget.name == T_NAME else budget
        for budget in plan.budgets
    ]
    return replace(plan, budgets=tuple(budgets))


def _candidates(
    first: Plan, build: Build, launch: LaunchFacts, free: bool, smallest: int
) -> Iterator[tuple[LaunchFacts, Plan]]:
    """The plan as it is, with smaller graphs, and then the same with smaller T."""
    tokens = first.max_dispatch_tokens_per_rank
    sizes: list[int | None] = [launch.default_tokens]
    if free:
        sizes += [size for size in SMALLER if smallest <= size < tokens]
    captures = launch.cuda_graph_max_bs_decode is None and launch.decode_graph_cap is None
    for size in sizes:
        same = size == launch.default_tokens
        changed = launch if same else replace(launch, default_tokens=size, follows_cap=False)
        known = first if same else build(changed)
        if known is not first and known.max_dispatch_tokens_per_rank >= tokens:
            continue  # typed values need as much
        yield changed, known
        for cap in GRAPH_CAPS if captures else ():
            if known.cuda_graph_max_bs_decode > cap >= launch.graph_multiple:
                capped = replace(changed, decode_graph_cap=cap)
                yield capped, build(capped)


def _beyond_stock(launch: LaunchFacts) -> Callable[[Plan], int]:
    """How many of the values that take memory a plan fills beyond what the stock host takes: where
    the KV cache ends smaller than under it, none of them should be to blame."""
    graph = stock_graph(launch, facts_of(launch), launch.max_running_requests or 0)

    def beyond(plan: Plan) -> int:
        tokens = plan.max_dispatch_tokens_per_rank > HOST_TOKENS_PER_RANK
        return tokens + (plan.cuda_graph_max_bs_decode > graph)

    return beyond


def _grown(plan: Plan, build: Build, model: ModelFacts, launch: LaunchFacts) -> Plan:
    """The largest T whose extra bytes take at most a tenth of the KV cache."""
    before, tokens = plan.memory, plan.max_dispatch_tokens_per_rank
    if before is None or before.kv_room_bytes <= 0 or not plan.bounds_prefill:
        return plan
    if launch.chunked_prefill_size is not None or launch.disaggregation_mode == "decode":
        return plan  # a larger T would buy no shorter prefill
    if plan.rdma_buffer_bytes == 0 or tokens < DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP:
        return plan  # its bytes are not known, or the backend asks for less by itself
    if before.less_than_stock:
        return plan
    typed = launch.memory.fraction if launch.memory is not None else None
    for size in LARGER:
        graph = plan.cuda_graph_max_bs_decode or None
        changed = replace(launch, default_tokens=size, decode_graph_cap=graph)
        found = build(changed)
        if found.max_dispatch_tokens_per_rank != size or size <= tokens:
            continue
        memory = memory_of(found, model, changed)
        extra = memory.buffer_bytes + memory.workspace_bytes
        extra -= before.buffer_bytes + before.workspace_bytes
        extra = max(extra, before.kv_room_bytes - memory.kv_room_bytes)
        cheap = extra * GROWTH_SHARE <= before.kv_room_bytes
        if cheap and fits(memory, typed) and not memory.less_than_stock:
            reason = (
                f"takes {gib(extra)} more than {tokens}: at most a tenth of the "
                f"{gib(before.kv_room_bytes)} of KV cache that {tokens} leaves"
            )
            return _because(replace(found, memory=memory), reason)
    return plan


def _worth_it(
    found: Plan, first: Plan, build: Build, model: ModelFacts, launch: LaunchFacts
) -> Plan:
    """``found`` with the reason for its smaller T; or a plan with that of ``first``, where it fits
    and the smaller T would gain no KV cache to speak of."""
    memory, tokens = _memory(found), first.max_dispatch_tokens_per_rank
    typed = launch.memory.fraction if launch.memory is not None else None
    same = (
        replace(plan, memory=held)
        for changed, plan in _candidates(first, build, launch, False, tokens)
        if fits(held := memory_of(plan, model, changed), typed)
    )
    kept = min(same, key=_beyond_stock(launch), default=None)
    left = gib(memory.kv_cache_bytes)
    if kept is None:
        weights = gib(memory.weights_bytes)
        reason = f"{tokens} leave too little beside {weights} of weights; these leave {left} of KV "
        return _because(found, reason + "cache")
    without = _memory(kept)
    if memory.kv_cache_bytes <= without.kv_cache_bytes + without.kv_tolerance_bytes:
        return kept
    stock = gib(memory.stock_cache_bytes)
    return _because(
        found,
        f"{tokens} leave {gib(without.kv_cache_bytes)} of KV cache, these {left}; {stock} under "
        "the stock host",
    )


def _memory(plan: Plan) -> Memory:
    """Of a plan whose memory is known."""
    assert plan.memory is not None
    return plan.memory
