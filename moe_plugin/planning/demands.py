"""What the values a user gave demand of T: rows per rank, and whether they can be captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from math import gcd

from ..batched_backend import Capability, Mode
from .compatibility import FLASHINFER_TILE
from .facts import GRAPH_MULTIPLE, LaunchFacts, ModelFacts
from .plan import Rejection
from .row_budgets import (
    captured_requests,
    ceil_div,
    ceil_to,
    chunk_per_group,
    floor_to,
    prefill_tokens_per_group,
    requests_per_group,
)

HOST_MAX_PREFILL_TOKENS = 16384
"""The host's default of ``--max-prefill-tokens``: indistinguishable from the same value typed."""


@dataclass(frozen=True, slots=True)
class Need:
    """Rows per rank that one explicit value of the user's asks for."""

    flag: str
    got: str
    rows: int
    fits: int
    """Largest value of the flag that T carries."""


def _capturable(launch: LaunchFacts) -> int:
    """Smallest decode batch that the host captures: its rows divide by the alignment."""
    if launch.two_batch_overlap:
        return launch.host_alignment
    return launch.host_alignment // gcd(launch.draft_width, launch.host_alignment)


def decode_requests(launch: LaunchFacts, tokens: int) -> int:
    """Requests per group whose rows fit T, at a size that the host can capture; 0 if none."""
    most = tokens * launch.attn_tp_size // launch.draft_width
    for multiple in (launch.graph_multiple, _capturable(launch)):
        if most >= multiple:
            return floor_to(most, multiple)
    return 0


def prefill_chunk(launch: LaunchFacts, tokens: int) -> int:
    """Largest chunk per group, in whole pages, whose every forward fits T; 0 if none."""
    rows = tokens * launch.attn_tp_size
    if launch.dynamic_chunking and launch.pp_size > 1:
        rows = floor_to(rows * 4 // 5, GRAPH_MULTIPLE) or rows * 4 // 5
    return floor_to(rows, launch.page_size)


def needs_of(launch: LaunchFacts, capability: Capability, tokens: int) -> list[Need]:
    """Rows per rank for every value that the user gave, and what T would carry instead."""
    needs: list[Need] = []
    groups, scatter = launch.attn_dp_size, launch.attn_tp_size
    over = f" / {scatter} attention-TP ranks" if scatter > 1 else ""
    per = f" // {groups} DP groups" if groups > 1 else ""
    dynamic = launch.dynamic_chunking and launch.pp_size > 1
    chunk = launch.chunked_prefill_size
    if Mode.EXTEND in capability.modes and launch.disaggregation_mode != "decode":
        most_chunk = prefill_chunk(launch, tokens)
        if chunk is not None and chunk_per_group(chunk, groups) > 0:
            here = chunk_per_group(chunk, groups)
            most = max(here, ceil_div(5 * here, 4)) if dynamic else here
            grown = " x 1.25 (dynamic chunking)" if dynamic else ""
            needs.append(
                Need(
                    "--chunked-prefill-size",
                    f"{chunk}{per}{grown}{over} = {ceil_div(most, scatter)} rows per rank",
                    ceil_div(most, scatter),
                    most_chunk * groups,
                )
            )
        if dynamic and launch.max_prefill_tokens != HOST_MAX_PREFILL_TOKENS:
            rows = ceil_div(launch.max_prefill_tokens, scatter)
            got = f"{launch.max_prefill_tokens}{over} = {rows} rows per rank (dynamic chunking)"
            needs.append(Need("--max-prefill-tokens", got, rows, tokens * scatter))
        graph = launch.cuda_graph_max_bs_prefill
        if launch.prefill_graphs and graph is not None:
            captured = ceil_to(graph, GRAPH_MULTIPLE)
            rows = ceil_div(captured, scatter)
            got = f"{graph}, captured as {captured}{over} = {rows} rows per rank"
            fits = floor_to(tokens * scatter, launch.graph_multiple)
            needs.append(Need("--cuda-graph-max-bs-prefill", got, rows, fits))
    if Mode.DECODE in capability.modes and launch.disaggregation_mode != "prefill":
        needs += _decode_needs(launch, tokens, per, over)
    return needs


def _decode_needs(launch: LaunchFacts, tokens: int, per: str, over: str) -> list[Need]:
    needs = []
    width, scatter = launch.draft_width, launch.attn_tp_size
    drafts = f" x {width} draft tokens" if width > 1 else ""
    fits = decode_requests(launch, tokens)
    running, graph = launch.max_running_requests, launch.cuda_graph_max_bs_decode
    if running is not None:
        rows = ceil_div(requests_per_group(running, launch.attn_dp_size) * width, scatter)
        got = f"{running}{per}{drafts}{over} = {rows} rows per rank"
        most = fits * launch.attn_dp_size
        needs.append(Need("--max-running-requests", got, rows, most))
    if launch.decode_graphs and graph is not None:
        captured = graph
        if running is not None:
            pool = requests_per_group(running, launch.attn_dp_size)
            captured = captured_requests(graph, pool, launch.host_alignment)
        rows = ceil_div(captured * width, scatter)
        clamp = f" (clamped to {captured} by the request pool)" if captured < graph else ""
        got = f"{graph}{clamp}{drafts}{over} = {rows} rows per rank"
        needs.append(Need("--cuda-graph-max-bs-decode", got, rows, fits))
    return needs


def check_needs(
    model: ModelFacts, launch: LaunchFacts, capability: Capability, tokens: int, multiple: int
) -> list[Rejection]:
    """Refuse each explicit value that T, a multiple of ``multiple``, cannot carry."""
    errors = [
        Rejection(
            "rows per rank and forward",
            got=f"{need.flag} {need.got}",
            allowed=f"<= {tokens} (tokens per rank)",
            fix=f"{need.flag} {need.fits}",
            changes=((need.flag, str(need.fits)),),
        )
        for need in needs_of(launch, capability, tokens)
        if need.rows > tokens
    ]
    if Mode.DECODE in capability.modes and decode_requests(launch, tokens) == 0:
        least = _least_tokens(launch, decode_requests, multiple)
        errors.append(
            Rejection(
                "rows per rank and forward",
                got=f"one captured decode batch of {launch.draft_width} draft tokens per request",
                allowed=f"<= {tokens} rows over {launch.attn_tp_size} attention-TP ranks",
                fix=f"--batched-dp-moe-max-tokens {least}",
                changes=(("--batched-dp-moe-max-tokens", str(least)),),
            )
        )
    errors += _check_capture(launch, capability, tokens)
    elsewhere = launch.known_chunk
    if Mode.EXTEND not in capability.modes and elsewhere > 0:  # <= 0: chunking, and mixing, is off
        roomy = ("--chunked-prefill-size", str(tokens * launch.attn_dp_size))
        errors += _check_mixed(launch, elsewhere, roomy if elsewhere < 2 else None)
    if Mode.EXTEND not in capability.modes or launch.disaggregation_mode == "decode":
        return errors
    return errors + _check_chunk(model, launch, tokens, multiple)


def _check_capture(launch: LaunchFacts, capability: Capability, tokens: int) -> list[Rejection]:
    """A decode graph below the alignment leaves the host an empty capture list: an assert."""
    graph, least = launch.cuda_graph_max_bs_decode, _capturable(launch)
    if (
        graph is None
        or graph >= least
        or not launch.decode_graphs
        or Mode.DECODE not in capability.modes
        or launch.disaggregation_mode == "prefill"
    ):
        return []
    fix = max(least, min(decode_requests(launch, tokens), GRAPH_MULTIPLE * least))
    return [
        Rejection(
            "captured decode batch",
            got=f"--cuda-graph-max-bs-decode {graph}, of which no batch divides over "
            f"{launch.attn_tp_size} attention-TP ranks",
            allowed=f">= {least}",
            fix=f"--cuda-graph-max-bs-decode {fix}",
            changes=(("--cuda-graph-max-bs-decode", str(fix)),),
        )
    ]


def _least_tokens(
    launch: LaunchFacts, fitting: Callable[[LaunchFacts, int], int], multiple: int
) -> int:
    """Smallest T, a multiple of ``multiple``, in which anything fits."""
    return next(tokens for tokens in count(multiple, multiple) if fitting(launch, tokens))


def _check_chunk(
    model: ModelFacts, launch: LaunchFacts, tokens: int, multiple: int
) -> list[Rejection]:
    """Chunking must be on, leave room beside mixed decode rows, and not grow past T."""
    groups = launch.attn_dp_size
    most = prefill_chunk(launch, tokens)
    raw = launch.chunked_prefill_size
    errors = []
    if most == 0:
        least = _least_tokens(launch, prefill_chunk, multiple)
        errors.append(
            Rejection(
                "rows per rank and forward",
                got=f"one page of {launch.page_size} tokens, the least that a prefill advances",
                allowed=f"<= {tokens} rows over {launch.attn_tp_size} attention-TP ranks",
                fix=f"--batched-dp-moe-max-tokens {least}",
                changes=(("--batched-dp-moe-max-tokens", str(least)),),
            )
        )
        most = prefill_chunk(launch, least)
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
    errors += _check_alignment(launch, chunk)
    return errors + _check_mixed(launch, chunk, fixed if chunk < 2 else None)


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
    launch: LaunchFacts, chunk: int, raise_chunk: tuple[str, str] | None = None
) -> list[Rejection]:
    """Mixed decode rows are taken out of the chunk: running requests must leave some of it."""
    running, groups = launch.max_running_requests, launch.attn_dp_size
    if not launch.mixed_chunk or running is None or launch.disaggregation_mode != "null":
        return []
    per_group = requests_per_group(running, groups)
    if per_group < chunk:
        return []
    room = chunk if raise_chunk is None else int(raise_chunk[1]) // groups
    changes = [] if raise_chunk is None else [raise_chunk]
    if per_group >= room:
        changes.append(("--max-running-requests", str(max(1, room // 2) * groups)))
    return [
        Rejection(
            "running requests with mixed chunks",
            got=f"{per_group} running requests per DP group, which leave "
            f"{chunk - per_group} of {chunk} chunk tokens to prefill",
            allowed=f"< {chunk} per DP group",
            fix=" ".join(f"{flag} {value}" for flag, value in changes),
            changes=tuple(changes),
        )
    ]
