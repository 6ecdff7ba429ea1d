"""The planner: integers in, frozen plan out. Nothing is read, nothing is measured.

A batched all-to-all moves at most T rows per rank and forward. Everything that decides how many
rows a rank may hold follows from T here, once: facts and limits give T, T gives the budgets
(prefill chunk, graph sizes, running requests), and both give the buffer. ``docs/budgets.md`` shows
the same arithmetic on one page.
"""

from __future__ import annotations

from dataclasses import replace

from ..batched_backend import Capability
from ..capability import use_batched_dp_moe
from .budget_checks import check_budgets, check_counts
from .compatibility import choose_runner, splits_experts
from .explain import explain_plan
from .facts import LaunchFacts, ModelFacts, physical_experts
from .fixes import complete
from .groups_apart import groups_apart, typed_apart
from .integers import ceil_to, floor_to
from .limits import Limits
from .memory import workspace_bytes
from .memory_refusal import within_memory
from .mixed_chunks import may_mix
from .plan import Plan, Rejection, Source
from .row_budgets import RowBudget, row_budgets
from .transport_checks import check_model, check_tokens_per_rank, token_multiple
from .weight_formats import FORMATS

RUNNING = "max_running_requests"


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
    if errors := check_counts(launch):
        return Plan(capability=capability, transport=launch.transport, errors=tuple(errors))
    plan = _plan_within_memory(model, launch, limits, capability)
    return replace(plan, errors=complete(plan.errors, model, launch, limits, _replan))


def _replan(model: ModelFacts, launch: LaunchFacts, limits: Limits) -> tuple[Rejection, ...]:
    capability = use_batched_dp_moe(launch.capability_facts(model))
    return _plan_within_memory(model, launch, limits, capability).errors if capability.ok else ()


def _plan_within_memory(
    model: ModelFacts, launch: LaunchFacts, limits: Limits, capability: Capability
) -> Plan:
    """The plan that memory allows, with mixed chunks where they are the default."""
    plan = _plan_apart(model, launch, limits, capability)
    if not may_mix(model, launch, plan):
        return plan
    decided = replace(
        launch,
        mixed_chunk=True,
        default_tokens=plan.max_dispatch_tokens_per_rank,
        decode_graph_cap=plan.cuda_graph_max_bs_decode or None,
    )
    mixed = _plan_apart(model, decided, limits, capability)
    smaller = mixed.max_dispatch_tokens_per_rank < plan.max_dispatch_tokens_per_rank
    if mixed.errors or smaller:
        return plan
    return replace(mixed, budgets=(*plan.budgets[:1], *mixed.budgets[1:]))  # T has its reason there


def _plan_apart(
    model: ModelFacts, launch: LaunchFacts, limits: Limits, capability: Capability
) -> Plan:
    """DP groups are kept apart where that is typed, or costs no T and leaves the KV cache at least
    what the host alone would: what each group then holds whole takes memory."""
    if not groups_apart(model, launch, capability):
        return _sized(model, launch, limits, capability, apart=False)
    apart = _sized(model, launch, limits, capability, apart=True)
    if launch.memory is None or typed_apart(launch):
        return apart
    joined = _sized(model, launch, limits, capability, apart=False)
    if len(apart.errors) != len(joined.errors):
        return min(apart, joined, key=lambda plan: len(plan.errors))
    smaller = apart.max_dispatch_tokens_per_rank < joined.max_dispatch_tokens_per_rank
    return joined if smaller or _leaves_less(apart, joined) else apart


def _leaves_less(apart: Plan, joined: Plan) -> bool:
    """Whether the KV cache is smaller for it, and smaller than the stock host's."""
    ours, other = apart.memory, joined.memory
    if ours is None or other is None or not ours.weights_source:
        return False
    return ours.less_than_stock and ours.kv_cache_bytes < other.kv_cache_bytes


def _sized(
    model: ModelFacts, launch: LaunchFacts, limits: Limits, capability: Capability, *, apart: bool
) -> Plan:
    if launch.memory is not None and apart:
        launch = replace(launch, memory=replace(launch.memory, whole_dense=True, whole_head=True))

    def build(changed: LaunchFacts) -> Plan:
        return replace(_plan_once(model, changed, limits, capability), groups_apart=apart)

    return within_memory(build, model, launch, limits)


def _fp8_rows(model: ModelFacts, runner: str) -> bool:
    """Whether the experts take rows in FP8, and quantise between their GEMMs."""
    known = FORMATS.get(model.weight_format)
    if runner == "moe_plugin" and known is not None and known.own is not None:
        return known.own.rows == "fp8"
    return model.weight_format.startswith("fp8")


def _plan_once(
    model: ModelFacts, launch: LaunchFacts, limits: Limits, capability: Capability
) -> Plan:
    """One pass over one set of facts."""
    experts = physical_experts(model, launch)
    multiple = token_multiple(model, launch, limits)
    most = limits.largest_tokens(model.hidden_size, launch.tp_size, experts, multiple)
    tokens_per_rank, source, errors = _choose_tokens_per_rank(
        model, launch, limits, capability, most, multiple
    )
    launch, notes = _capped(launch, capability, tokens_per_rank)
    budgets = row_budgets(launch, capability.modes, tokens_per_rank, limits.default_max_tokens)
    if notes:  # the cap is no longer the user's own
        budgets = tuple(replace(b, typed=b.typed and b.name != RUNNING) for b in budgets)
    errors += check_model(model, launch, limits, most, multiple)
    runner, unsupported = choose_runner(model, launch, capability)
    errors += unsupported
    errors += check_budgets(
        model, launch, capability.modes, budgets, tokens_per_rank, multiple, most
    )
    size = limits.buffer_bytes
    buffer = size(tokens_per_rank, model.hidden_size, launch.tp_size, experts) if size else 0
    values = {budget.name: budget.value for budget in budgets}
    fp8_rows = _fp8_rows(model, runner)
    plan = Plan(
        capability=capability,
        max_dispatch_tokens_per_rank=tokens_per_rank,
        token_multiple=multiple,
        chunked_prefill_size=values.get("chunked_prefill_size", 0),
        cuda_graph_max_bs_prefill=values.get("cuda_graph_max_bs_prefill", 0),
        cuda_graph_max_bs_decode=values.get("cuda_graph_max_bs_decode", 0),
        max_running_requests=values.get("max_running_requests", 0),
        nvshmem_qp_depth=(
            max(limits.default_qp_depth, launch.qp_depth or 0, limits.qp_depth(tokens_per_rank))
            if limits.qp_depth
            else 0
        ),
        rdma_buffer_bytes=buffer,
        rdma_device_bytes=limits.device_bytes(buffer) if limits.device_bytes else buffer,
        workspace_bytes=workspace_bytes(
            experts,
            tokens_per_rank,
            model.hidden_size,
            model.moe_intermediate_size,
            model.dtype,
            ranks=launch.tp_size,
            fp8=fp8_rows,
            host=runner == "host",
            batches=2 if launch.two_batch_overlap else 1,
        ),
        errors=tuple(errors),
        notes=tuple(notes),
        runner=runner,
        own_decode=runner == "host" and splits_experts(model, launch, capability),
        transport=launch.transport,
        ep_size=launch.tp_size,
        num_experts=experts,
        hidden_size=model.hidden_size,
        top_k=model.top_k,
        attn_tp_size=launch.attn_tp_size,
        dtype=model.dtype,
        fp8_rows=fp8_rows,
        mixed_chunk=launch.mixed_chunk,
    )
    return explain_plan(plan, launch, limits, budgets, source, most)


def _choose_tokens_per_rank(
    model: ModelFacts,
    launch: LaunchFacts,
    limits: Limits,
    capability: Capability,
    most: int,
    multiple: int,
) -> tuple[int, Source, list[Rejection]]:
    """T: our flag, else the host's variable, else what the user's own values need."""
    errors: list[Rejection] = []
    variable = limits.tokens_variable or ""
    flag, host = launch.max_tokens, launch.host_tokens_per_rank
    if flag is not None and host is not None and flag != host:
        errors.append(
            Rejection(
                "tokens per rank",
                got=f"{launch.max_tokens_source} {flag} and {variable}={host}",
                allowed="one value",
                fix=f"unset {variable}",
                changes=((variable, None),),
                kind="config",
            )
        )
    explicit = flag if flag is not None else host
    if most == 0:  # refused for it; plan on, so that one message names everything
        return multiple, "default", errors
    if explicit is not None:
        name = launch.max_tokens_source if flag is not None else variable
        errors += check_tokens_per_rank(model, launch, limits, explicit, name, most, multiple)
        # Plan on with the nearest value that works, so that one message names everything.
        return min(max(floor_to(explicit, multiple), multiple), most), "user", errors
    default = launch.default_tokens or limits.default_max_tokens
    default = min(ceil_to(default, multiple), most)
    typed = [b for b in row_budgets(launch, capability.modes, default) if b.typed]
    needed = max((b.rows for b in typed if _is_demand(launch, b, most)), default=0)
    tokens_per_rank = min(max(default, ceil_to(needed, multiple)), most)
    return tokens_per_rank, "derived" if tokens_per_rank > default else "default", errors


def _is_demand(launch: LaunchFacts, budget: RowBudget, most: int) -> bool:
    """Whether T follows what the user typed. A cap on running requests that no T carries, or none
    that memory allows, is a ceiling far above what runs: the host lets its KV cache undercut it."""
    if budget.most is None:
        return False
    carried = launch.follows_cap and budget.rows <= most
    return launch.required or budget.name != RUNNING or carried


def _capped(
    launch: LaunchFacts, capability: Capability, tokens_per_rank: int
) -> tuple[LaunchFacts, list[str]]:
    """Running requests as far as T carries them, where refusing was not asked for.

    Typed, they are a cap: the host takes what fits its KV cache, and ends in DeepEP's assert if
    that is more than T. Under a lower cap the same requests wait.
    """
    running = launch.max_running_requests
    if launch.required or running is None:
        return launch, []
    for budget in row_budgets(launch, capability.modes, tokens_per_rank):
        limit = budget.limit(tokens_per_rank)
        if budget.name == RUNNING and limit and limit < running:
            note = (
                f"--max-running-requests {running} is lowered to {limit}: "
                f"T = {tokens_per_rank} carries no more ({budget.bound})"
            )
            return replace(launch, max_running_requests=limit), [note]
    return launch, []
