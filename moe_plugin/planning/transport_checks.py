"""Limits of the transport that no budget can bend: refused, each with the way out."""

from __future__ import annotations

from dataclasses import replace

from .expert_choice import dispatches_fp8
from .facts import GRAPH_MULTIPLE, LaunchFacts, ModelFacts, physical_experts
from .host_models import NO_REDUNDANT
from .integers import ceil_to
from .leaving import LEAVE, LEAVE_TEXT
from .limits import Limits
from .memory import gib
from .plan import Change, Rejection


def check_tokens_per_rank(
    model: ModelFacts,
    launch: LaunchFacts,
    limits: Limits,
    tokens_per_rank: int,
    name: str,
    most: int,
    multiple: int,
) -> list[Rejection]:
    """An explicit T against every limit that depends on T."""
    experts = physical_experts(model, launch)

    def reject(limit: str, got: str, allowed: str, fix: int) -> Rejection:
        written = f"{name}={fix}" if name.isupper() else f"{name} {fix}"
        changes: tuple[Change, ...] = ((name, str(fix)),)
        if launch.host_tokens_per_rank is not None and name != limits.tokens_variable:
            changes += ((limits.tokens_variable or "", None),)
            written += f", and unset {limits.tokens_variable}"
        return Rejection(limit, got, allowed, written, changes)

    shown = f"{name}={tokens_per_rank}" if name.isupper() else f"{name} {tokens_per_rank}"
    if tokens_per_rank <= 0:
        fix = min(limits.default_max_tokens, most)
        return [reject("tokens per rank", shown, ">= 1", fix)]
    if limits.max_tokens is not None and tokens_per_rank > limits.max_tokens:
        allowed = f"<= {limits.max_tokens} ({limits.source('max_tokens')})"
        return [reject("tokens per rank", shown, allowed, most)]
    if tokens_per_rank > most and most and limits.buffer_bytes and limits.max_buffer_bytes:
        size = limits.buffer_bytes(tokens_per_rank, model.hidden_size, launch.tp_size, experts)
        if size >= limits.max_buffer_bytes:
            got = (
                f"{size} bytes ({gib(size)}) for {shown}, hidden {model.hidden_size}, "
                f"{experts} experts"
            )
            allowed = f"< {limits.max_buffer_bytes} ({limits.source('max_buffer_bytes')})"
            return [reject("communication buffer bytes per rank", got, allowed, most)]
    if tokens_per_rank % multiple:
        fix = min(most, max(multiple, ceil_to(tokens_per_rank, multiple)))
        why = f"a multiple of {multiple}: captured buckets are multiples of {GRAPH_MULTIPLE}"
        if multiple > GRAPH_MULTIPLE:
            fp8 = dispatches_fp8(model, launch) and limits.fp8_row_multiple > 1
            limit = "fp8_row_multiple" if fp8 else "row_multiple"
            rows = getattr(limits, limit)
            why = (
                f"a multiple of {multiple}, so that ranks x T is one of {rows}"
                f"{' as FP8 rows need it' if fp8 else ''} ({limits.source(limit)})"
            )
        error = reject("tokens per rank", shown, why, fix)
        # The host's own variable, in a launch whose captured buckets are the host's own.
        unplanned = multiple_of(model, launch, limits, captured=1)
        host_runs = name == limits.tokens_variable and tokens_per_rank % unplanned == 0
        return [replace(error, host_runs=host_runs)]
    return []


def token_multiple(model: ModelFacts, launch: LaunchFacts, limits: Limits) -> int:
    """What T must be a multiple of in this launch."""
    return multiple_of(model, launch, limits, captured=GRAPH_MULTIPLE)


def multiple_of(model: ModelFacts, launch: LaunchFacts, limits: Limits, *, captured: int) -> int:
    """The same where captured buckets are multiples of ``captured``."""
    fp8 = dispatches_fp8(model, launch)
    return limits.token_multiple(launch.tp_size, captured, fp8=fp8)


def check_model(
    model: ModelFacts, launch: LaunchFacts, limits: Limits, most: int, multiple: int
) -> list[Rejection]:
    """Shapes, dtype, ranks and experts against the transport's hard limits.

    Args:
        model: the routed experts.
        launch: topology and redundant experts.
        limits: of the transport.
        most: the largest T, 0 if none.
        multiple: what T must be a multiple of.
    """
    errors = [] if most else [_no_buffer(model, launch, limits, multiple)]
    ranks = launch.tp_size
    experts = physical_experts(model, launch)

    def leave(limit: str, got: object, allowed: str, source: str) -> None:
        where = f" ({limits.source(source)})" if limits.source(source) else ""
        errors.append(
            Rejection(limit, f"{got}", f"{allowed}{where}", LEAVE_TEXT, LEAVE, "unsupported")
        )

    if limits.hidden_sizes is not None and model.hidden_size not in limits.hidden_sizes:
        leave("hidden size", model.hidden_size, f"{sorted(limits.hidden_sizes)}", "hidden_sizes")
    if limits.max_top_k is not None and model.top_k > limits.max_top_k:
        leave("experts per token", model.top_k, f"<= {limits.max_top_k}", "max_top_k")
    if experts < limits.min_experts:
        leave("experts", experts, f">= {limits.min_experts}", "min_experts")
    if not limits.ranks_ok(ranks):
        allowed = f"<= {limits.max_free_ranks}, or a multiple of {limits.rank_multiple}"
        leave("expert-parallel ranks", f"--tp-size {ranks}", allowed, "ranks")
    fills = not model.classes & NO_REDUNDANT
    if experts % ranks and most and (fills or not launch.redundant_experts):
        more = launch.redundant_experts + -experts % ranks
        fix, changes = LEAVE_TEXT, LEAVE
        if fills:
            fix = f"--ep-num-redundant-experts {more}, or a --tp-size that divides {experts}"
            changes = (("--ep-num-redundant-experts", str(more)),)
        errors.append(
            Rejection(
                "experts per rank",
                got=f"{experts} experts over {ranks} ranks (--tp-size; the host sets ep = tp)",
                allowed="a whole number",
                fix=fix,
                changes=changes,
            )
        )
    if limits.dtypes is not None and model.dtype not in limits.dtypes:
        errors.append(
            Rejection(
                "activation dtype",
                got=model.dtype,
                allowed=f"{sorted(limits.dtypes)} ({limits.source('dtypes')})",
                fix="--dtype bfloat16",
                changes=(("--dtype", "bfloat16"),),
                kind="unsupported",
            )
        )
    return errors


def _no_buffer(model: ModelFacts, launch: LaunchFacts, limits: Limits, multiple: int) -> Rejection:
    """Not even the smallest T has a buffer: for the redundant experts, or for the model's own."""
    hidden, ranks, experts = model.hidden_size, launch.tp_size, model.num_experts
    redundant = launch.redundant_experts
    size = limits.buffer_bytes
    least = size(multiple, hidden, ranks, experts + redundant) if size else 0
    limit = "communication buffer bytes per rank"
    allowed = f"< {limits.max_buffer_bytes} ({limits.source('max_buffer_bytes')})"
    if redundant > 0 and limits.largest_tokens(hidden, ranks, experts, multiple):
        got = (
            f"{least} bytes at T = {multiple} for {experts} experts and {redundant} redundant ones"
        )
        change = ("--ep-num-redundant-experts", str(-experts % ranks))
        return Rejection(limit, got, allowed, " ".join(change), (change,))
    got = f"{least} bytes at T = {multiple} for {experts + redundant} experts"
    return Rejection(limit, got, allowed, LEAVE_TEXT, LEAVE)
