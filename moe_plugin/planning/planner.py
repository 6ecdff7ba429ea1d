"""The planner: integers in, frozen plan out. Nothing is read, nothing is measured.

A batched all-to-all moves at most T rows per rank and forward. Everything that decides how many
rows a rank may hold follows from T here, once: prefill chunk, graph sizes, running requests,
buffer. ``docs/budgets.md`` shows the same arithmetic on one page.
"""

from __future__ import annotations

from dataclasses import replace

from ..batched_backend import Capability
from ..capability import use_batched_dp_moe
from .compatibility import LEAVE, LEAVE_TEXT, choose_runner
from .demands import check_needs, decode_requests, needs_of, prefill_chunk
from .facts import GRAPH_MULTIPLE, LaunchFacts, ModelFacts
from .fixes import complete
from .ledger import ledger
from .limits import Limits
from .memory import workspace_bytes
from .memory_refusal import within_memory
from .plan import Budget, Plan, Rejection, Source
from .row_budgets import ceil_to, chunk_per_group, floor_to, requests_per_group
from .transport_checks import check_capacity, check_model, token_multiple

__all__ = ["Budget", "Plan", "Rejection", "make_plan"]

HOST_REQUESTS = 4096
"""Most running requests per scheduler that the host chooses by itself: each costs a row of its
request table, 4 bytes per token of context."""
HOST_DECODE_GRAPH = 512
"""Largest decode graph that the host captures by itself. A larger T does not ask for more: its
memory reserve grows by up to 4.5 MiB per request and DP group, and larger batches run eagerly."""


def make_plan(
    model: ModelFacts,
    launch: LaunchFacts,
    limits: Limits,
    capability: Capability | None = None,
) -> Plan:
    """Plan one launch. Never raises for a refusal: it is in :attr:`Plan.errors`.

    Args:
        model: the routed experts.
        launch: topology, modes and what the user set.
        limits: of the transport that will carry the rows.
        capability: the capability's answer when it was asked before; asked here otherwise.
    """
    capability = capability or use_batched_dp_moe(launch.capability_facts(model))
    if not capability.ok:
        return Plan(capability=capability, transport=launch.transport, ep_size=launch.tp_size)
    plan = _plan_within_memory(model, launch, limits, capability)
    return replace(plan, errors=complete(plan.errors, model, launch, limits, _replan))


def _replan(model: ModelFacts, launch: LaunchFacts, limits: Limits) -> tuple[Rejection, ...]:
    capability = use_batched_dp_moe(launch.capability_facts(model))
    return _plan_within_memory(model, launch, limits, capability).errors if capability.ok else ()


def _plan_within_memory(
    model: ModelFacts, launch: LaunchFacts, limits: Limits, capability: Capability
) -> Plan:
    def build(changed: LaunchFacts) -> Plan:
        return _plan_once(model, changed, limits, capability)

    return within_memory(build, model, launch, limits)


def _plan_once(
    model: ModelFacts, launch: LaunchFacts, limits: Limits, capability: Capability
) -> Plan:
    """One pass over one set of facts."""
    experts = model.num_experts + launch.redundant_experts
    multiple = token_multiple(model, launch, limits)
    most = limits.largest_tokens(model.hidden_size, launch.tp_size, experts, multiple)
    tokens, source, errors = _choose_tokens(model, launch, limits, capability, most, multiple)
    errors += check_model(model, launch, limits)
    runner, unsupported = choose_runner(model, launch, capability)
    errors += unsupported
    errors += check_needs(model, launch, capability, tokens, multiple)
    size = limits.buffer_bytes
    buffer = size(tokens, model.hidden_size, launch.tp_size, experts) if size else 0
    plan = Plan(
        capability=capability,
        max_dispatch_tokens_per_rank=tokens,
        token_multiple=multiple,
        nvshmem_qp_depth=(
            max(limits.default_qp_depth, launch.qp_depth or 0, limits.qp_depth(tokens))
            if limits.qp_depth
            else 0
        ),
        rdma_buffer_bytes=buffer,
        rdma_device_bytes=limits.device_bytes(buffer) if limits.device_bytes else buffer,
        workspace_bytes=workspace_bytes(
            experts,
            tokens,
            model.hidden_size,
            model.moe_intermediate_size,
            model.dtype,
            ranks=launch.tp_size,
            fp8=model.weight_format.startswith("fp8"),
            host=runner == "host",
            batches=2 if launch.two_batch_overlap else 1,
        ),
        errors=tuple(errors),
        runner=runner,
        transport=launch.transport,
        ep_size=launch.tp_size,
        num_experts=experts,
        hidden_size=model.hidden_size,
        top_k=model.top_k,
        attn_tp_size=launch.attn_tp_size,
        dtype=model.dtype,
    )
    return _fill(plan, launch, limits, source, most)


def _choose_tokens(
    model: ModelFacts,
    launch: LaunchFacts,
    limits: Limits,
    capability: Capability,
    most: int,
    multiple: int,
) -> tuple[int, Source, list[Rejection]]:
    """T: our flag, else the host's variable, else what the user's own values need."""
    errors: list[Rejection] = []
    variable = limits.capacity_variable or ""
    flag, capacity = launch.max_tokens, launch.capacity
    if flag is not None and capacity is not None and flag != capacity:
        errors.append(
            Rejection(
                "tokens per rank",
                got=f"{launch.max_tokens_source} {flag} and {variable}={capacity}",
                allowed="one value",
                fix=f"unset {variable}",
                changes=((variable, None),),
                kind="config",
            )
        )
    explicit = flag if flag is not None else capacity
    if explicit is not None:
        name = launch.max_tokens_source if flag is not None else variable
        errors += check_capacity(model, launch, limits, explicit, name, most, multiple)
        # Plan on with the nearest value that works, so that one message names everything.
        return min(max(floor_to(explicit, multiple), multiple), most), "user", errors
    default = launch.default_tokens or limits.default_max_tokens
    default = min(ceil_to(default, multiple), most)
    needed = max((need.rows for need in needs_of(launch, capability, default)), default=0)
    tokens = min(max(default, ceil_to(needed, multiple)), most)
    if most == 0:
        size = limits.buffer_bytes
        least = size(multiple, model.hidden_size, launch.tp_size, model.num_experts) if size else 0
        errors.append(
            Rejection(
                "communication buffer bytes per rank",
                got=f"{least} bytes at {multiple} tokens per rank",
                allowed=f"< {limits.max_buffer_bytes} ({limits.source('max_buffer_bytes')})",
                fix=LEAVE_TEXT,
                changes=LEAVE,
            )
        )
        tokens = multiple
    return tokens, "derived" if tokens > default else "default", errors


def _fill(plan: Plan, launch: LaunchFacts, limits: Limits, source: Source, most: int) -> Plan:
    """Fill what the user left unset, and record every value with its arithmetic."""
    tokens = plan.max_dispatch_tokens_per_rank
    groups = launch.attn_dp_size
    chunk = graph_prefill = running = graph_decode = 0
    if plan.bounds_prefill:
        chunk = launch.chunked_prefill_size or 0
        if launch.chunked_prefill_size is None:
            chunk = prefill_chunk(launch, tokens) * groups
        rows = tokens * launch.attn_tp_size
        if launch.prefill_graphs:
            here = chunk_per_group(chunk, groups) or rows
            fits = floor_to(min(rows, here), GRAPH_MULTIPLE)
            graph_prefill = launch.cuda_graph_max_bs_prefill or max(GRAPH_MULTIPLE, fits)
    if plan.bounds_decode and launch.disaggregation_mode != "prefill":
        fits = decode_requests(launch, tokens)
        running = launch.max_running_requests or min(fits, HOST_REQUESTS) * groups
        here = chunk_per_group(chunk, groups) or launch.known_chunk
        if launch.mixed_chunk and launch.max_running_requests is None and here > 0:
            # Half of each chunk stays free for prefill: at running >= chunk it would be none.
            running = min(running, max(1, here // 2) * groups)
        if launch.decode_graphs:
            pool = ceil_to(requests_per_group(running, groups), launch.graph_multiple)
            default = decode_requests(launch, min(tokens, limits.default_max_tokens))
            largest = min(fits, pool, max(default, HOST_DECODE_GRAPH))
            largest = min(largest, launch.decode_graph_cap or largest)
            graph_decode = launch.cuda_graph_max_bs_decode or max(1, largest)
    plan = replace(
        plan,
        chunked_prefill_size=chunk,
        cuda_graph_max_bs_prefill=graph_prefill,
        cuda_graph_max_bs_decode=graph_decode,
        max_running_requests=running,
    )
    return ledger(plan, launch, limits, source, most)
