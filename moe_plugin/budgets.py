"""The planner: integers in, frozen plan out. Nothing is read, nothing is measured.

A batched all-to-all moves at most T rows per rank and forward. Everything that decides how many
rows a rank may hold follows from T here, once: prefill chunk, graph sizes, running requests,
buffer. ``docs/budgets.md`` shows the same arithmetic on one page.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

from .capability import Capability, Mode, use_batched_dp_moe
from .checks import check_capacity, check_model
from .completion import complete
from .facts import GRAPH_MULTIPLE, LaunchFacts, ModelFacts
from .limits import Limits
from .memory import workspace_bytes
from .plan import Budget, Plan, Rejection, Source
from .rows import (
    captured_requests,
    ceil_div,
    ceil_to,
    chunk_per_group,
    floor_to,
    prefill_tokens_per_group,
    requests_per_group,
)
from .support import LEAVE, LEAVE_TEXT, choose_runner

__all__ = ["Budget", "Plan", "Rejection", "make_plan"]

HOST_MAX_PREFILL_TOKENS = 16384
"""The host's default of ``--max-prefill-tokens``: indistinguishable from the same value typed."""
HOST_DECODE_GRAPH = 512
"""Largest decode graph that the host captures by itself. A larger T does not ask for more: its
memory reserve grows by up to 4.5 MiB per request and DP group, and larger batches run eagerly."""


@dataclass(frozen=True, slots=True)
class _Need:
    """Rows per rank that one explicit value of the user's asks for."""

    flag: str
    got: str
    rows: int
    fits: int
    """Largest value of the flag that T carries."""


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
    plan = _plan_once(model, launch, limits, capability)
    return replace(plan, errors=complete(plan.errors, model, launch, limits, _replan))


def _replan(model: ModelFacts, launch: LaunchFacts, limits: Limits) -> tuple[Rejection, ...]:
    capability = use_batched_dp_moe(launch.capability_facts(model))
    return _plan_once(model, launch, limits, capability).errors if capability.ok else ()


def _plan_once(
    model: ModelFacts, launch: LaunchFacts, limits: Limits, capability: Capability
) -> Plan:
    """One pass over one set of facts."""
    experts = model.num_experts + launch.redundant_experts
    most = limits.largest_tokens(model.hidden_size, launch.tp_size, experts, GRAPH_MULTIPLE)
    tokens, source, errors = _choose_tokens(model, launch, limits, capability, most)
    errors += check_model(model, launch, limits)
    runner, unsupported = choose_runner(model, launch, capability)
    errors += unsupported
    errors += _check_needs(model, launch, capability, tokens)
    size = limits.buffer_bytes
    buffer = size(tokens, model.hidden_size, launch.tp_size, experts) if size else 0
    plan = Plan(
        capability=capability,
        max_dispatch_tokens_per_rank=tokens,
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
            fp8=model.weight_format.startswith("fp8"),
            host=runner == "host",
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
    model: ModelFacts, launch: LaunchFacts, limits: Limits, capability: Capability, most: int
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
        errors += check_capacity(model, launch, limits, explicit, name, most)
        # Plan on with the nearest value that works, so that one message names everything.
        return min(max(floor_to(explicit, GRAPH_MULTIPLE), GRAPH_MULTIPLE), most), "user", errors
    default = min(limits.default_max_tokens, most)
    needed = max((need.rows for need in _needs(launch, capability, default)), default=0)
    tokens = min(max(default, ceil_to(needed, GRAPH_MULTIPLE)), most)
    if most == 0:
        size = limits.buffer_bytes
        least = size(8, model.hidden_size, launch.tp_size, model.num_experts) if size else 0
        errors.append(
            Rejection(
                "communication buffer bytes per rank",
                got=f"{least} bytes at {GRAPH_MULTIPLE} tokens per rank",
                allowed=f"< {limits.max_buffer_bytes} ({limits.source('max_buffer_bytes')})",
                fix=LEAVE_TEXT,
                changes=LEAVE,
            )
        )
        tokens = GRAPH_MULTIPLE
    return tokens, "derived" if tokens > default else "default", errors


def _decode_requests(launch: LaunchFacts, tokens: int) -> int:
    """Requests per group whose rows fit T, at a size that the host can capture; 0 if none."""
    most = tokens * launch.attn_tp_size // launch.draft_width
    capturable = launch.host_alignment
    if not launch.two_batch_overlap:
        capturable //= gcd(launch.draft_width, capturable)
    for multiple in (launch.graph_multiple, capturable):
        if most >= multiple:
            return floor_to(most, multiple)
    return 0


def _prefill_chunk(launch: LaunchFacts, tokens: int) -> int:
    """Largest chunk per group, in whole pages, whose every forward fits T; 0 if none."""
    rows = tokens * launch.attn_tp_size
    if launch.dynamic_chunking and launch.pp_size > 1:
        rows = floor_to(rows * 4 // 5, GRAPH_MULTIPLE) or rows * 4 // 5
    return floor_to(rows, launch.page_size)


def _needs(launch: LaunchFacts, capability: Capability, tokens: int) -> list[_Need]:
    """Rows per rank for every value that the user gave, and what T would carry instead."""
    needs: list[_Need] = []
    groups, scatter = launch.attn_dp_size, launch.attn_tp_size
    over = f" / {scatter} attention-TP ranks" if scatter > 1 else ""
    per = f" // {groups} DP groups" if groups > 1 else ""
    dynamic = launch.dynamic_chunking and launch.pp_size > 1
    chunk = launch.chunked_prefill_size
    if Mode.EXTEND in capability.modes and launch.disaggregation_mode != "decode":
        most_chunk = _prefill_chunk(launch, tokens)
        if chunk is not None and chunk_per_group(chunk, groups) > 0:
            here = chunk_per_group(chunk, groups)
            most = max(here, ceil_div(5 * here, 4)) if dynamic else here
            grown = " x 1.25 (dynamic chunking)" if dynamic else ""
            needs.append(
                _Need(
                    "--chunked-prefill-size",
                    f"{chunk}{per}{grown}{over} = {ceil_div(most, scatter)} rows per rank",
                    ceil_div(most, scatter),
                    most_chunk * groups,
                )
            )
        if dynamic and launch.max_prefill_tokens != HOST_MAX_PREFILL_TOKENS:
            rows = ceil_div(launch.max_prefill_tokens, scatter)
            got = f"{launch.max_prefill_tokens}{over} = {rows} rows per rank (dynamic chunking)"
            needs.append(_Need("--max-prefill-tokens", got, rows, tokens * scatter))
        graph = launch.cuda_graph_max_bs_prefill
        if launch.prefill_graphs and graph is not None:
            captured = ceil_to(graph, GRAPH_MULTIPLE)
            rows = ceil_div(captured, scatter)
            got = f"{graph}, captured as {captured}{over} = {rows} rows per rank"
            fits = floor_to(tokens * scatter, launch.graph_multiple)
            needs.append(_Need("--cuda-graph-max-bs-prefill", got, rows, fits))
    if Mode.DECODE in capability.modes and launch.disaggregation_mode != "prefill":
        needs += _decode_needs(launch, tokens, per, over)
    return needs


def _decode_needs(launch: LaunchFacts, tokens: int, per: str, over: str) -> list[_Need]:
    needs = []
    width, scatter = launch.draft_width, launch.attn_tp_size
    drafts = f" x {width} draft tokens" if width > 1 else ""
    fits = _decode_requests(launch, tokens)
    running, graph = launch.max_running_requests, launch.cuda_graph_max_bs_decode
    if running is not None:
        rows = ceil_div(requests_per_group(running, launch.attn_dp_size) * width, scatter)
        got = f"{running}{per}{drafts}{over} = {rows} rows per rank"
        most = fits * launch.attn_dp_size
        needs.append(_Need("--max-running-requests", got, rows, most))
    if launch.decode_graphs and graph is not None:
        captured = graph
        if running is not None and launch.disaggregation_mode != "decode":
            # A decode-only instance adds pre-allocated slots to the pool: no clamp to rely on.
            pool = requests_per_group(running, launch.attn_dp_size)
            captured = captured_requests(graph, pool, launch.host_alignment)
        rows = ceil_div(captured * width, scatter)
        clamp = f" (clamped to {captured} by the request pool)" if captured < graph else ""
        got = f"{graph}{clamp}{drafts}{over} = {rows} rows per rank"
        needs.append(_Need("--cuda-graph-max-bs-decode", got, rows, fits))
    return needs


def _check_needs(
    model: ModelFacts, launch: LaunchFacts, capability: Capability, tokens: int
) -> list[Rejection]:
    """Refuse each explicit value that T cannot carry."""
    errors = [
        Rejection(
            "rows per rank and forward",
            got=f"{need.flag} {need.got}",
            allowed=f"<= {tokens} (tokens per rank)",
            fix=f"{need.flag} {need.fits}",
            changes=((need.flag, str(need.fits)),),
        )
        for need in _needs(launch, capability, tokens)
        if need.rows > tokens
    ]
    if Mode.DECODE in capability.modes and _decode_requests(launch, tokens) == 0:
        least = _least_tokens(launch)
        errors.append(
            Rejection(
                "rows per rank and forward",
                got=f"one captured decode batch of {launch.draft_width} draft tokens per request",
                allowed=f"<= {tokens} rows over {launch.attn_tp_size} attention-TP ranks",
                fix=f"--batched-dp-moe-max-tokens {least}",
                changes=(("--batched-dp-moe-max-tokens", str(least)),),
            )
        )
    if Mode.EXTEND not in capability.modes or launch.disaggregation_mode == "decode":
        return errors
    return errors + _check_chunk(model, launch, tokens)


def _least_tokens(launch: LaunchFacts) -> int:
    tokens = GRAPH_MULTIPLE
    while not _decode_requests(launch, tokens):
        tokens += GRAPH_MULTIPLE
    return tokens


def _check_chunk(model: ModelFacts, launch: LaunchFacts, tokens: int) -> list[Rejection]:
    """Chunking must be on, leave room beside mixed decode rows, and not grow past T."""
    groups = launch.attn_dp_size
    most = _prefill_chunk(launch, tokens)
    raw = launch.chunked_prefill_size
    errors = []
    if most == 0:
        least = GRAPH_MULTIPLE
        while not _prefill_chunk(launch, least):
            least += GRAPH_MULTIPLE
        errors.append(
            Rejection(
                "rows per rank and forward",
                got=f"one page of {launch.page_size} tokens, the least that a prefill advances",
                allowed=f"<= {tokens} rows over {launch.attn_tp_size} attention-TP ranks",
                fix=f"--batched-dp-moe-max-tokens {least}",
                changes=(("--batched-dp-moe-max-tokens", str(least)),),
            )
        )
        most = _prefill_chunk(launch, least)
    chunk = most if raw is None else chunk_per_group(raw, groups)
    fixed = ("--chunked-prefill-size", str(most * groups))
    if chunk <= 0:
        off = "off" if raw is not None and raw <= 0 else f"{raw} // {groups} DP groups = 0, off"
        errors.append(
            Rejection(
                "rows per rank and forward",
                got=f"chunked prefill {off}: one request prefills up to its whole context, "
                f"{model.context_length} tokens",
                allowed=f"<= {tokens} x {launch.attn_tp_size} tokens per DP group",
                fix=" ".join(fixed),
                changes=(fixed,),
            )
        )
        chunk = most
    if launch.dynamic_chunking and launch.pp_size > 1:
        rows = prefill_tokens_per_group(
            0, dynamic_chunking=True, pp_size=2, max_prefill_tokens=launch.max_prefill_tokens
        )
        fits = tokens * launch.attn_tp_size
        if rows > fits and launch.max_prefill_tokens == HOST_MAX_PREFILL_TOKENS:
            errors.append(
                Rejection(
                    "rows per rank and forward",
                    got=f"dynamic chunking grows a chunk up to --max-prefill-tokens {rows}",
                    allowed=f"<= {tokens} x {launch.attn_tp_size} = {fits} tokens per DP group",
                    fix=f"--max-prefill-tokens {fits}",
                    changes=(("--max-prefill-tokens", str(fits)),),
                )
            )
    running = launch.max_running_requests
    if launch.mixed_chunk and running is not None:
        per_group = requests_per_group(running, groups)
        if per_group >= chunk:
            roomy = max(1, min(chunk, most) // 2) * groups
            changes = [("--max-running-requests", str(roomy))]
            if chunk < 2:
                changes.append(fixed)
            errors.append(
                Rejection(
                    "running requests with mixed chunks",
                    got=f"{per_group} running requests per DP group, which leave "
                    f"{chunk - per_group} of {chunk} chunk tokens to prefill",
                    allowed=f"< {chunk} per DP group",
                    fix=" ".join(f"{flag} {value}" for flag, value in changes),
                    changes=tuple(changes),
                )
            )
    return errors


def _fill(plan: Plan, launch: LaunchFacts, limits: Limits, source: Source, most: int) -> Plan:
    """Fill what the user left unset, and record every value with its arithmetic."""
    from .ledger import ledger

    tokens = plan.max_dispatch_tokens_per_rank
    groups = launch.attn_dp_size
    chunk = graph_prefill = running = graph_decode = 0
    if plan.bounds_prefill:
        chunk = launch.chunked_prefill_size or 0
        if launch.chunked_prefill_size is None:
            chunk = _prefill_chunk(launch, tokens) * groups
        rows = tokens * launch.attn_tp_size
        if launch.prefill_graphs:
            here = chunk_per_group(chunk, groups) or rows
            fits = floor_to(min(rows, here), GRAPH_MULTIPLE)
            graph_prefill = launch.cuda_graph_max_bs_prefill or max(GRAPH_MULTIPLE, fits)
    if plan.bounds_decode and launch.disaggregation_mode != "prefill":
        fits = _decode_requests(launch, tokens)
        running = launch.max_running_requests or fits * groups
        if launch.mixed_chunk and launch.max_running_requests is None and chunk > 0:
            # Half of each chunk stays free for prefill: at running >= chunk it would be none.
            running = min(running, max(1, chunk_per_group(chunk, groups) // 2) * groups)
        if launch.decode_graphs:
            pool = ceil_to(requests_per_group(running, groups), launch.graph_multiple)
            default = _decode_requests(launch, min(tokens, limits.default_max_tokens))
            largest = min(fits, pool, max(default, HOST_DECODE_GRAPH))
            graph_decode = launch.cuda_graph_max_bs_decode or max(1, largest)
    plan = replace(
        plan,
        chunked_prefill_size=chunk,
        cuda_graph_max_bs_prefill=graph_prefill,
        cuda_graph_max_bs_decode=graph_decode,
        max_running_requests=running,
    )
    return ledger(plan, launch, limits, source, most)
