"""What the budgets of a launch cannot be: each refused with a value that works."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from ..batched_backend import Mode
from .compatibility import FLASHINFER_TILE
from .facts import GRAPH_MULTIPLE, LaunchFacts, ModelFacts
from .integers import ceil_div, ceil_to, floor_to
from .leaving import LEAVE, LEAVE_TEXT
from .plan import Rejection, words_of
from .row_budgets import (
    RowBudget,
    chunk_per_dp_group,
    decode_room,
    prefill_room,
    requests_per_dp_group,
)

ROWS = "rows per rank and forward"
_OF_REQUESTS = ("cuda_graph_max_bs_decode", "max_running_requests")
LEAST_PREFILL_GRAPH = 4
"""Below it the host makes an empty list (``generate_prefill_cuda_graph_batch_sizes``)."""


def check_counts(launch: LaunchFacts) -> list[Rejection]:
    """Counts that no arithmetic can start from: mistyped."""
    cap = launch.memory.kv_token_cap if launch.memory is not None else None
    counts: list[tuple[str, int | None, int, str | None]] = [  # the least, and what to type instead
        ("--tp-size", launch.tp_size, 1, "1"),
        ("--pp-size", launch.pp_size, 1, "1"),
        ("--ep-num-redundant-experts", launch.redundant_experts, 0, "0"),
        ("--max-running-requests", launch.max_running_requests, 1, None),
        ("--max-total-tokens", cap, 1, None),
    ]
    errors = [
        _count(flag, value, f">= {least}", instead)
        for flag, value, least, instead in counts
        if value is not None and value < least
    ]
    if launch.memory is not None and math.isnan(launch.memory.fraction or 0):
        errors.append(_count("--mem-fraction-static", "nan", "a share, such as 0.85", None))
    if launch.moe_dp_size > 1:  # ``runtime_context.py``: tp = moe_ep x moe_dp x moe_tp
        errors.append(
            Rejection(
                "expert parallelism",
                got=f"--moe-dp-size {launch.moe_dp_size} with an all-to-all over all of --tp-size",
                allowed="1",
                fix="--moe-dp-size 1",
                changes=(("--moe-dp-size", "1"),),
                kind="config",
            )
        )
    return errors


def _count(flag: str, value: object, allowed: str, instead: str | None) -> Rejection:
    change = (flag, instead)
    return Rejection("launch", f"{flag} {value}", allowed, words_of([change]), (change,), "config")


def check_budgets(
    model: ModelFacts,
    launch: LaunchFacts,
    modes: Collection[Mode],
    budgets: Sequence[RowBudget],
    tokens_per_rank: int,
    multiple: int,
    most: int,
) -> list[Rejection]:
    """Refuse what T cannot carry, and what the host could not run at any T.

    Args:
        model: the routed experts.
        launch: topology, modes and what the user set.
        modes: forward modes that go through the bounded buffer.
        budgets: of this launch and T.
        tokens_per_rank: T.
        multiple: what T must be a multiple of.
        most: the largest T.
    """
    decodes = Mode.DECODE in modes and launch.disaggregation_mode != "prefill"
    prefills = Mode.EXTEND in modes and launch.disaggregation_mode != "decode"
    errors = overruns(budgets, tokens_per_rank)
    if decodes:
        errors += _check_decode(launch, tokens_per_rank, multiple, most)
    if prefills:
        errors += _check_prefill(model, launch, tokens_per_rank, multiple, most)
    if decodes and launch.mixed_chunk and launch.disaggregation_mode == "null":
        errors += _check_mixed(launch, budgets, tokens_per_rank)
    return errors


def overruns(
    budgets: Sequence[RowBudget], tokens_per_rank: int, resolved: str = ""
) -> list[Rejection]:
    """Refuse each value that asks for more rows than T. Where no number of requests is small
    enough, their drafts are too wide, which is a reason of its own.

    Args:
        budgets: of one launch and T.
        tokens_per_rank: T.
        resolved: said after the numbers where the host has changed what the user typed.
    """
    return [
        Rejection(
            ROWS,
            got=f"{budget.flag} {budget.arithmetic}{resolved}",
            allowed=f"<= {tokens_per_rank} (tokens per rank)",
            fix=f"{budget.flag} {budget.most}",
            changes=((budget.flag, str(budget.most)),),
        )
        for budget in budgets
        if budget.overruns(tokens_per_rank) and (budget.most or budget.name not in _OF_REQUESTS)
    ]


def _larger_t(least: int, most: int, got: str, allowed: str) -> Rejection:
    """Something that takes ``least`` tokens per rank."""
    if least > most:
        return Rejection(ROWS, got, allowed, LEAVE_TEXT, LEAVE)
    changes = (("--batched-dp-moe-max-tokens", str(least)),)
    return Rejection(ROWS, got, allowed, f"--batched-dp-moe-max-tokens {least}", changes)


def _check_decode(
    launch: LaunchFacts, tokens_per_rank: int, multiple: int, most: int
) -> list[Rejection]:
    errors = []
    if decode_room(launch, tokens_per_rank) < launch.capture_multiple:
        rows = launch.capture_multiple * launch.draft_width
        errors.append(
            _larger_t(
                ceil_to(ceil_div(rows, launch.attn_tp_size), multiple),
                most,
                f"one captured decode batch of {launch.draft_width} draft tokens per request",
                f"<= {tokens_per_rank} rows over {launch.attn_tp_size} attention-TP ranks",
            )
        )
    graph = launch.cuda_graph_max_bs_decode
    if launch.decode_graphs and graph is not None and graph < launch.capture_multiple:
        errors.append(nothing_to_capture(launch, "decode", graph))
    return errors


def nothing_to_capture(launch: LaunchFacts, phase: str, graph: int) -> Rejection:
    """Refuse sizes that leave the host an empty capture list: an assert, after the weights."""
    flag = f"--cuda-graph-max-bs-{phase}"
    if graph <= 0:
        off = f"--disable-{phase}-cuda-graph"
        return Rejection(
            f"captured {phase} batch",
            got=f"{flag} {graph}, which leaves graphs on and the host nothing to capture",
            allowed=f"sizes that it captures, or {off}",
            fix=f"{off} in place of {flag}",
            changes=((flag, None), (off, "")),
        )
    if phase == "prefill":
        least, why = GRAPH_MULTIPLE, "of which the host captures none"
    else:
        least = launch.capture_multiple
        why = f"of which no batch divides by {launch.host_alignment} (attention-TP ranks)"
    return Rejection(
        f"captured {phase} batch",
        got=f"{flag} {graph}, {why}",
        allowed=f">= {least}",
        fix=f"{flag} {least}",
        changes=((flag, str(least)),),
    )


def _check_prefill(
    model: ModelFacts, launch: LaunchFacts, tokens_per_rank: int, multiple: int, most: int
) -> list[Rejection]:
    """Chunking must be on, hold a page, and leave room beside mixed decode rows."""
    dp_groups, page = launch.attn_dp_size, launch.page_size
    errors = []
    room = prefill_room(launch, tokens_per_rank)
    if room < page:
        errors.append(_page(launch, tokens_per_rank, multiple, most))
        room = (
            int(errors[0].changes[0][1] or 0) if errors[0].changes[0][0] == "--page-size" else page
        )
    else:
        room = floor_to(room, page)
    graph = launch.cuda_graph_max_bs_prefill
    if launch.prefill_graphs and graph is not None and graph < LEAST_PREFILL_GRAPH:
        errors.append(nothing_to_capture(launch, "prefill", graph))
    raw = launch.chunked_prefill_size
    chunk = room if raw is None else chunk_per_dp_group(raw, dp_groups)
    fixed = ("--chunked-prefill-size", str(room * dp_groups))
    if chunk <= 0:
        off = "off" if raw is not None and raw <= 0 else f"{raw} // {dp_groups} DP groups = 0, off"
        errors.append(
            Rejection(
                ROWS,
                got=f"chunked prefill {off}: one request prefills up to its whole context, "
                f"{model.context_length} tokens",
                allowed=f"<= {tokens_per_rank} x {launch.attn_tp_size} tokens per DP group",
                fix=" ".join(fixed),
                changes=(fixed,),
            )
        )
        chunk = room
    return errors + _check_alignment(launch, chunk)


def _page(launch: LaunchFacts, tokens_per_rank: int, multiple: int, most: int) -> Rejection:
    """A prefill advances by whole pages: T must hold one, and if no T does, pages are too large."""
    page = launch.page_size
    got = f"one page of {page} tokens, the least that a prefill advances"
    rows = ceil_div(5 * page, 4) if launch.grows_chunks else page
    least = ceil_to(ceil_div(rows, launch.attn_tp_size), multiple)
    allowed = f"<= {tokens_per_rank} rows over {launch.attn_tp_size} attention-TP ranks"
    if least <= most:
        return _larger_t(least, most, got, allowed)
    smaller = 1 << prefill_room(launch, tokens_per_rank).bit_length() - 1
    return Rejection(
        ROWS,
        f"{got} (--page-size {page})",
        allowed,
        f"--page-size {smaller}",
        (("--page-size", str(smaller)),),
    )


def _check_alignment(launch: LaunchFacts, chunk: int) -> list[Rejection]:
    """A chunk below the host's truncation alignment: its scheduler refuses, after the weights."""
    if chunk >= launch.chunk_alignment:
        return []
    tile = 1 << chunk.bit_length() - 1
    return [
        Rejection(
            "prefill chunk with deterministic inference",
            got=f"{chunk} tokens per DP group",
            allowed=f">= {launch.chunk_alignment}, FlashInfer's split tile",
            fix=f"{FLASHINFER_TILE}={tile}, or --attention-backend triton, which has none",
            changes=((FLASHINFER_TILE, str(tile)),),
            kind="config",
        )
    ]


def _check_mixed(
    launch: LaunchFacts, budgets: Sequence[RowBudget], tokens_per_rank: int
) -> list[Rejection]:
    """Mixed decode rows are taken out of the chunk: running requests must leave some of it."""
    dp_groups = launch.attn_dp_size
    values = {budget.name: budget.value for budget in budgets}
    requests = requests_per_dp_group(values["max_running_requests"], dp_groups)
    chunk, room = launch.known_chunk, tokens_per_rank
    if "chunked_prefill_size" in values:
        chunk = chunk_per_dp_group(values["chunked_prefill_size"], dp_groups)
        room = floor_to(prefill_room(launch, tokens_per_rank), launch.page_size)
    if not 0 < chunk <= requests:  # 0: chunking, and mixing, is off
        return []
    changes = []
    if chunk < 2:
        changes.append(("--chunked-prefill-size", str(room * dp_groups)))
    else:
        room = chunk
    if requests >= room:
        changes.append(("--max-running-requests", str(max(1, room // 2) * dp_groups)))
    return [
        Rejection(
            "running requests with mixed chunks",
            got=f"{requests} running requests per DP group, which leave "
            f"{chunk - requests} of {chunk} chunk tokens to prefill",
            allowed=f"< {chunk} per DP group",
            fix=" ".join(f"{flag} {value}" for flag, value in changes),
            changes=tuple(changes),
        )
    ]
