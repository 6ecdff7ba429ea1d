"""Refuse a launch that memory cannot hold, naming every single change that was seen to help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

from .device_memory import (
    UNSET_PREFILL_GRAPH,
    dispatches_normally,
    hosts_graph,
    rounded_fraction,
    stock_chunk,
)
from .expert_choice import host_problem
from .facts import LaunchFacts, ModelFacts
from .integers import ceil_div
from .limits import HOST_TOKENS_PER_RANK, Limits
from .memory import DTYPE_BYTES, gib
from .memory_fit import Build, settle
from .memory_record import PROMPTS, Memory, MemoryFacts
from .memory_use import USEFUL_SHARE, needed
from .plan import Change, Plan, Rejection, words_of
from .row_budgets import row_budgets

Works = Callable[[LaunchFacts], bool]
"""Whether a changed launch is planned without an error."""
MORE_RANKS = (2, 4, 8, 16, 32)
SIZES = (512, 256, 128, 64)
GRAPHS = (256, 128, 64, 32)
SPECULATING_REQUESTS = 48
"""Running requests of the stock host with speculation where nobody named a number
(``arg_groups/speculative_hook.py``)."""


def within_memory(build: Build, model: ModelFacts, launch: LaunchFacts, limits: Limits) -> Plan:
    """The plan that memory allows (:func:`settle`), refused where nothing fits."""
    plan, fitting = settle(build, model, launch)
    if not fitting:

        def works(changed: LaunchFacts) -> bool:
            found, fitting = settle(build, model, changed)
            return fitting and len(found.errors) <= len(plan.errors)

        error = memory_rejection(plan, launch, limits, works)
        runs = stock_has_experts(plan, model, launch) and stock_has_room(plan, launch, limits)
        error = replace(error, host_runs=runs)
        plan = replace(plan, errors=(*plan.errors, error))
    return replace(plan, prompt_steps=_prompt_steps(plan, launch))


def stock_has_experts(plan: Plan, model: ModelFacts, launch: LaunchFacts) -> bool:
    """Whether the stock host computes what the plugin's experts would; other launches are refused
    for their experts, or left alone."""
    normal = dispatches_normally(plan, launch)
    return plan.runner != "moe_plugin" or not host_problem(model, launch, normal=normal)


def stock_has_room(plan: Plan, launch: LaunchFacts, limits: Limits) -> bool:
    """Whether the stock host may run the launch: at its own T there is room for the buffer and the
    rows that combine reads beside its weights and KV cache, and T carries what it runs at start.
    What else takes memory is an estimate, and none to refuse a launch for that works without us."""
    memory, facts = plan.memory, launch.memory
    if memory is None or facts is None or launch.max_tokens is not None:
        return False  # a T of ours is what was asked for
    if memory.loading_bytes > memory.device_bytes:
        return False
    tokens = launch.host_tokens_per_rank or HOST_TOKENS_PER_RANK
    if _stock_overruns(plan, launch, facts, tokens):
        return False
    size, held = 0, plan.num_experts * tokens * plan.hidden_size * DTYPE_BYTES.get(plan.dtype, 2)
    if limits.buffer_bytes is not None:
        size = limits.buffer_bytes(tokens, plan.hidden_size, plan.ep_size, plan.num_experts)
    held += limits.device_bytes(size) if limits.device_bytes else size
    fraction = memory.stock_fraction if facts.fraction is None else facts.fraction
    return memory.stock_kv_bytes > 0 and held <= memory.usable_bytes * (1 - fraction)


def _stock_overruns(
    plan: Plan, launch: LaunchFacts, facts: MemoryFacts, tokens_per_rank: int
) -> bool:
    """Whether the first chunk or a captured batch of the stock host, as typed or as it chooses
    them, is more than ``tokens_per_rank``: it ends in an assertion once weights are loaded."""
    running = launch.max_running_requests
    if running is None and launch.draft_width > 1:
        running = SPECULATING_REQUESTS
    chunk, prefill = launch.chunked_prefill_size, launch.cuda_graph_max_bs_prefill
    if prefill is None and launch.a2a_backend == "deepep" and not launch.backend_late:
        prefill = UNSET_PREFILL_GRAPH
    stock = replace(
        launch,
        chunked_prefill_size=stock_chunk(facts) if chunk is None else chunk,
        max_running_requests=running,
        cuda_graph_max_bs_decode=hosts_graph(launch, facts, running or 0),
        cuda_graph_max_bs_prefill=prefill,
        prefill_graphs=launch.prefill_graphs and launch.surely_captures_prefills,
    )
    runs = {"chunked_prefill_size"}
    if not launch.two_batch_overlap:  # it dispatches a captured batch in halves
        runs |= {"cuda_graph_max_bs_decode", "cuda_graph_max_bs_prefill"}
    rows = row_budgets(stock, plan.capability.modes, tokens_per_rank)
    return any(budget.name in runs and budget.overruns(tokens_per_rank) for budget in rows)


def _prompt_steps(plan: Plan, launch: LaunchFacts) -> tuple[tuple[int, int], ...]:
    chunk = plan.chunked_prefill_size // launch.attn_dp_size
    if not plan.bounds_prefill or launch.disaggregation_mode == "decode" or chunk <= 0:
        return ()
    return tuple((tokens, ceil_div(tokens, chunk)) for tokens in PROMPTS)


def memory_rejection(plan: Plan, launch: LaunchFacts, limits: Limits, works: Works) -> Rejection:
    """What is too much, and the changes that make it fit, each planned before it is named."""
    memory = plan.memory
    assert memory is not None
    knobs = _working(plan, memory, launch, limits, works)
    changes, alternatives = (knobs[0], tuple(knobs[1:])) if knobs else ((), ())
    fix = ", or ".join(map(words_of, knobs))
    weights = f"{gib(memory.weights_bytes)} of weights, " if memory.weights_source else ""
    if memory.loading_bytes > memory.usable_bytes:
        got = (
            f"{gib(memory.loading_bytes)} while weights are loaded, which are quantised once all "
            "are on the device"
        )
        fix = fix or "more ranks, or a checkpoint that is quantised already"
        allowed = f"{gib(memory.usable_bytes)} of a device of {gib(memory.device_bytes)}"
        return Rejection("device memory", got, allowed, fix, changes, alternatives=alternatives)
    kept = memory.multimodal_bytes
    media = f", {gib(kept)} for images, video and audio" if kept else ""
    got = (
        f"{weights}{gib(memory.buffer_bytes)} of buffer and {gib(memory.workspace_bytes)} of "
        f"workspace at {plan.max_dispatch_tokens_per_rank} tokens per rank, "
        f"{gib(memory.graphs_bytes + memory.activations_bytes)} for graphs and what else runs"
        f"{media}"
    )
    return Rejection(
        "device memory",
        got,
        _allowed(memory, launch),
        fix or f"more than {launch.tp_size * MORE_RANKS[-1]} ranks, or a device with more memory",
        changes,
        alternatives=alternatives,
    )


def _allowed(memory: Memory, launch: LaunchFacts) -> str:
    usable = f"{gib(memory.usable_bytes)} of a device of {gib(memory.device_bytes)}"
    if launch.memory is None or launch.memory.fraction is None:
        return f"{usable}, with at least {gib(memory.device_bytes // USEFUL_SHARE)} of KV cache"
    static = int(memory.usable_bytes * launch.memory.fraction)
    return (
        f"{usable}: with --mem-fraction-static {launch.memory.fraction:g} {gib(static)} for "
        f"weights and KV cache, {gib(memory.usable_bytes - static)} for the rest"
    )


def _working(
    plan: Plan, memory: Memory, launch: LaunchFacts, limits: Limits, works: Works
) -> list[tuple[Change, ...]]:
    """One change of each kind that helps: the least of its kind; or two at once where none does."""

    def least(kind: Callable[[Plan, Memory, LaunchFacts, Limits], Options]) -> Options:
        options = kind(plan, memory, launch, limits)
        return islice((option for option in options if works(option[1])), 1)

    for kinds in ((_fractions, _tokens, _chunks, _graphs, _ranks), (_ranks_of_our_own_fraction,)):
        if found := [changes for kind in kinds for changes, _ in least(kind)]:
            return found
    return []


Options = Iterator[tuple[tuple[Change, ...], LaunchFacts]]


def _fractions(plan: Plan, memory: Memory, launch: LaunchFacts, limits: Limits) -> Options:
    del plan, limits
    if launch.memory is None or launch.memory.fraction is None:
        return
    fraction = rounded_fraction(needed(memory), launch.memory)
    if 0 < fraction < 1:
        facts = replace(launch.memory, fraction=fraction)
        yield (("--mem-fraction-static", f"{fraction:g}"),), replace(launch, memory=facts)
    facts = replace(launch.memory, fraction=None)
    yield (("--mem-fraction-static", None),), replace(launch, memory=facts)


def _tokens(plan: Plan, memory: Memory, launch: LaunchFacts, limits: Limits) -> Options:
    del memory
    if launch.max_tokens is None and launch.host_tokens_per_rank is None:
        return
    variable: tuple[Change, ...] = ()
    if launch.host_tokens_per_rank is not None and limits.tokens_variable:
        variable = ((limits.tokens_variable, None),)
    for size in SIZES:
        if size < plan.max_dispatch_tokens_per_rank and size % plan.token_multiple == 0:
            changes = (("--batched-dp-moe-max-tokens", str(size)), *variable)
            yield changes, replace(launch, max_tokens=size, host_tokens_per_rank=None)


def _chunks(plan: Plan, memory: Memory, launch: LaunchFacts, limits: Limits) -> Options:
    del plan, memory, limits
    chunk = launch.chunked_prefill_size or 0
    for size in SIZES:
        total = size * launch.attn_tp_size * launch.attn_dp_size
        if total < chunk:
            yield (
                (("--chunked-prefill-size", str(total)),),
                replace(launch, chunked_prefill_size=total, dp_group_chunk=None),
            )


def _graphs(plan: Plan, memory: Memory, launch: LaunchFacts, limits: Limits) -> Options:
    del plan, memory, limits
    for size in GRAPHS:
        if size < (launch.cuda_graph_max_bs_decode or 0):
            yield (
                (("--cuda-graph-max-bs-decode", str(size)),),
                replace(launch, cuda_graph_max_bs_decode=size),
            )


def _ranks(plan: Plan, memory: Memory, launch: LaunchFacts, limits: Limits) -> Options:
    del plan, memory, limits
    for times in MORE_RANKS:
        ranks, groups = launch.tp_size * times, launch.attn_dp_size * times
        changes: tuple[Change, ...] = (("--tp-size", str(ranks)),)
        if launch.attn_dp_size > 1:
            flag = launch.memory.groups_flag if launch.memory else ""
            changes += ((flag or "--attn-dp-size", str(groups)),)
        else:
            groups = 1
        yield changes, replace(launch, tp_size=ranks, attn_dp_size=groups)


def _ranks_of_our_own_fraction(
    plan: Plan, memory: Memory, launch: LaunchFacts, limits: Limits
) -> Options:
    """Where no number of them helps a fraction that was typed."""
    if launch.memory is None or launch.memory.fraction is None:
        return
    for changes, changed in _ranks(plan, memory, launch, limits):
        facts = replace(launch.memory, fraction=None)
        yield (*changes, ("--mem-fraction-static", None)), replace(changed, memory=facts)
