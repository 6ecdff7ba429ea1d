"""Rows that one rank dispatches in one forward, and what T allows in return. Integers only.

Every value that decides over rows is counted here and nowhere else: as the user typed it, as the
plan fills it, and as the host resolved it in the end. A "DP group" is one attention-DP group: one
scheduler, whose rows are scattered over its attention-TP ranks before every MoE layer. Sources are
paths below ``sglang/srt``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..batched_backend import Mode
from .facts import GRAPH_MULTIPLE, LaunchFacts
from .integers import ceil_div, ceil_to, floor_to

HOST_MAX_PREFILL_TOKENS = 16384
"""The host's default of ``--max-prefill-tokens``: indistinguishable from the same value typed."""
HOST_REQUESTS = 4096
"""Most running requests per scheduler that the host chooses by itself: each costs a row of its
request table, 4 bytes per token of context."""
HOST_DECODE_GRAPH = 512
"""Largest decode graph that the host captures by itself. A larger T does not ask for more: its
memory reserve grows by up to 4.5 MiB per request and DP group, and larger batches run eagerly."""


def chunk_per_dp_group(chunk: int, dp_groups: int) -> int:
    """Chunk of one DP group: the host floor-divides what the user typed.

    ``arg_groups/parallel_hook.py: handle_data_parallelism``. 0 means that chunking is off.
    """
    return max(0, chunk // dp_groups)


def requests_per_dp_group(max_running_requests: int, dp_groups: int) -> int:
    """Running requests of one DP group (``kv_cache_configurator.py: resolve_max_num_reqs``)."""
    return max(1, max_running_requests // dp_groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBudget:
    """One value of the host's: the rows that it asks for, and the largest that T carries.

    Attributes:
        name: the host's name for it.
        flag: the flag that sets it.
        value: as one would type it: over all DP groups where the host divides it by them.
        typed: the user chose it; otherwise it is what the plan fills in.
        rows: rows per rank in one forward.
        arithmetic: how the rows follow from the value.
        most: largest multiple of ``step`` that T carries; None where no value is too much.
        step: the host rounds values in between away: this much more is another row.
        bound: what ``most`` is made of.
    """

    name: str
    flag: str
    value: int
    typed: bool
    rows: int
    arithmetic: str
    most: int | None
    step: int
    bound: str

    def overruns(self, tokens_per_rank: int) -> bool:
        """Whether the value asks for more rows than T."""
        return self.most is not None and self.rows > tokens_per_rank

    def limit(self, tokens_per_rank: int) -> int | None:
        """The largest value that T carries, ``most`` or a value that the host rounds to it; None
        where there is none."""
        if self.most is None or self.rows > tokens_per_rank or self.value >= self.most + self.step:
            return self.most
        return max(self.most, self.value)


def row_budgets(
    launch: LaunchFacts, modes: Collection[Mode], tokens_per_rank: int, graph_default: int = 0
) -> tuple[RowBudget, ...]:
    """Every value that bounds the rows of this launch, typed or filled.

    Args:
        launch: topology, modes and what the user set; or, to verify, what the host resolved.
        modes: forward modes that go through the bounded buffer.
        tokens_per_rank: T.
        graph_default: T for which decode graphs are filled in any case, if they are many.
    """
    budgets: list[RowBudget] = []
    chunk = 0
    if Mode.EXTEND in modes:
        found = _chunk(launch, tokens_per_rank)
        chunk = chunk_per_dp_group(found.value, launch.attn_dp_size)
        budgets.append(found)
        if launch.grows_chunks:
            budgets.append(_prefill_tokens(launch, tokens_per_rank))
        if launch.prefill_graphs:
            budgets.append(_prefill_graph(launch, tokens_per_rank, chunk))
    # An instance that only prefills or decodes captures the other phase where that is asked for.
    decodes = Mode.DECODE in modes and launch.disaggregation_mode != "prefill"
    running = _running(launch, tokens_per_rank, chunk or launch.known_chunk)
    if launch.decode_graphs and (decodes or launch.disaggregation_mode == "prefill"):
        budgets.append(_decode_graph(launch, tokens_per_rank, running.value, graph_default))
    if decodes:
        budgets.append(running)
    return tuple(budgets)


def prefill_room(launch: LaunchFacts, tokens_per_rank: int) -> int:
    """Tokens of the largest chunk of one DP group that T carries, pages left aside.

    ``PrefillAdder`` admits at most the chunk, mixed decode rows included. Pipeline dynamic chunking
    probes at 1.25 times the chunk (``arg_groups/overrides.py: max_prefill_buffer_tokens``).
    """
    room = tokens_per_rank * launch.attn_tp_size
    return room * 4 // 5 if launch.grows_chunks else room


def decode_room(launch: LaunchFacts, tokens_per_rank: int) -> int:
    """Requests of one DP group whose rows fit T."""
    return tokens_per_rank * launch.attn_tp_size // launch.draft_width


def graph_room(launch: LaunchFacts, tokens_per_rank: int) -> int:
    """The same for a captured batch: DeepEP v2's check at start leaves attention TP out
    (``arg_groups/moe_hook.py: validate_deepep_v2_dispatch_token_budget``)."""
    if launch.whole_graphs:
        return tokens_per_rank // launch.draft_width
    return decode_room(launch, tokens_per_rank)


def decode_requests(launch: LaunchFacts, tokens_per_rank: int) -> int:
    """The same at a size that the host can capture, in eights where they fit; 0 if none."""
    room = decode_room(launch, tokens_per_rank)
    for multiple in (launch.graph_multiple, launch.capture_multiple):
        if room >= multiple:
            return floor_to(room, multiple)
    return 0


def captured_requests(launch: LaunchFacts, graph: int, pool: int | None) -> int:
    """Largest batch that a decode graph is captured at, at most; 0 if none.

    ``base_cuda_graph_runner.py: get_batch_sizes_to_capture`` drops sizes whose rows do not divide
    by the alignment, and clamps the list to the request pool, which it rounds *up* to the alignment
    first. Slots that a decode-only instance adds for transfers are not counted in the pool's size.
    """
    if pool is not None:
        graph = min(graph, ceil_to(pool, launch.host_alignment))
    return floor_to(max(0, graph), launch.capture_multiple)


def _over(launch: LaunchFacts, rows: int) -> str:
    scatter = launch.attn_tp_size
    over = f" / {scatter} attention-TP ranks" if scatter > 1 else ""
    return f"{over} = {rows} rows per rank"


def _per(launch: LaunchFacts) -> str:
    return f" // {launch.attn_dp_size} DP groups" if launch.attn_dp_size > 1 else ""


def _drafts(launch: LaunchFacts) -> str:
    return f" x {launch.draft_width} draft tokens" if launch.draft_width > 1 else ""


def _chunk(launch: LaunchFacts, tokens_per_rank: int) -> RowBudget:
    dp_groups, page = launch.attn_dp_size, launch.page_size
    room = prefill_room(launch, tokens_per_rank)
    value = launch.chunked_prefill_size
    if value is None:
        # In eights where chunks grow, so that a prefill graph can hold a whole one.
        fill = floor_to(room, GRAPH_MULTIPLE) if launch.grows_chunks else room
        value = (floor_to(fill, page) or floor_to(room, page)) * dp_groups
    tokens = chunk_per_dp_group(value, dp_groups)
    grown = ""
    if launch.grows_chunks:
        tokens, grown = ceil_div(5 * tokens, 4), " x 1.25 (dynamic chunking)"
    rows = ceil_div(tokens, launch.attn_tp_size)
    bounded = launch.disaggregation_mode != "decode"
    return RowBudget(
        name="chunked_prefill_size",
        flag="--chunked-prefill-size",
        value=value,
        typed=launch.chunked_prefill_size is not None,
        rows=rows,
        arithmetic=f"{value}{_per(launch)}{grown}{_over(launch, rows)}",
        most=floor_to(room, page) * dp_groups if bounded else None,
        step=page * dp_groups,
        bound=("T x attention TP x DP" + (" / 1.25" if grown else ""))
        if bounded
        else "a decode instance",
    )


def _prefill_tokens(launch: LaunchFacts, tokens_per_rank: int) -> RowBudget:
    """Dynamic chunking grows a chunk up to this many tokens (``dynamic_chunk_sizer.py``)."""
    value = launch.max_prefill_tokens
    rows = ceil_div(value, launch.attn_tp_size)
    bounded = launch.disaggregation_mode != "decode"
    return RowBudget(
        name="max_prefill_tokens",
        flag="--max-prefill-tokens",
        value=value,
        typed=value != HOST_MAX_PREFILL_TOKENS,
        rows=rows,
        arithmetic=f"{value} (dynamic chunking grows a chunk up to it){_over(launch, rows)}",
        most=tokens_per_rank * launch.attn_tp_size if bounded else None,
        step=1,
        bound="T x attention TP" if bounded else "a decode instance",
    )


def _prefill_graph(launch: LaunchFacts, tokens_per_rank: int, chunk: int) -> RowBudget:
    room = tokens_per_rank * launch.attn_tp_size
    value = launch.cuda_graph_max_bs_prefill
    if value is None:
        value = max(GRAPH_MULTIPLE, floor_to(min(room, chunk or room), GRAPH_MULTIPLE))
    # ``arg_groups/cuda_graph_hook.py: apply_deepep_adjustments`` rounds buckets up.
    captured = ceil_to(value, GRAPH_MULTIPLE)
    rows = ceil_div(captured, launch.attn_tp_size)
    rounded = f", captured as {captured}" if captured != value else ""
    return RowBudget(
        name="cuda_graph_max_bs_prefill",
        flag="--cuda-graph-max-bs-prefill",
        value=value,
        typed=launch.cuda_graph_max_bs_prefill is not None,
        rows=rows,
        arithmetic=f"{value}{rounded}{_over(launch, rows)}",
        most=floor_to(room, GRAPH_MULTIPLE),
        step=GRAPH_MULTIPLE,
        bound="T x attention TP",
    )


def _running(launch: LaunchFacts, tokens_per_rank: int, chunk: int) -> RowBudget:
    dp_groups, width = launch.attn_dp_size, launch.draft_width
    room, bound = decode_room(launch, tokens_per_rank), "T x attention TP // draft width x DP"
    mixed = launch.mixed_chunk and launch.disaggregation_mode == "null" and chunk > 0
    value, why = launch.max_running_requests, ""
    if value is None:
        fill = min(decode_requests(launch, tokens_per_rank), HOST_REQUESTS)
        if launch.running_cap is not None and launch.running_cap < fill:
            fill, why = launch.running_cap, ", as many as the KV cache has states for"
        # Half of each chunk stays free for prefill: at running >= chunk it would be none.
        value = (min(fill, max(1, chunk // 2)) if mixed else fill) * dp_groups
    graph = launch.cuda_graph_max_bs_decode
    if launch.decode_graphs and graph is not None and captured_requests(launch, graph, None) > room:
        # The request pool clamps that graph, which T would not carry.
        room = floor_to(room, launch.host_alignment) or room
        bound = "in whole graphs, T x attention TP // draft width x DP"
    if mixed and chunk <= room:
        room, bound = max(1, chunk - 1), "less than a chunk, with mixed chunks, x DP"
    requests = requests_per_dp_group(value, dp_groups)
    rows = ceil_div(requests * width, launch.attn_tp_size)
    return RowBudget(
        name="max_running_requests",
        flag="--max-running-requests",
        value=value,
        typed=launch.max_running_requests is not None,
        rows=rows,
        arithmetic=f"{value}{_per(launch)}{_drafts(launch)}{_over(launch, rows)}{why}",
        most=room * dp_groups,
        step=dp_groups,
        bound=bound,
    )


def _decode_graph(
    launch: LaunchFacts, tokens_per_rank: int, running: int, graph_default: int
) -> RowBudget:
    pool = requests_per_dp_group(running, launch.attn_dp_size)
    value = launch.cuda_graph_max_bs_decode
    if value is None:
        fits = decode_requests(launch, tokens_per_rank)
        default = decode_requests(launch, min(tokens_per_rank, graph_default))
        pooled = ceil_to(pool, launch.graph_multiple)
        room = graph_room(launch, tokens_per_rank)
        room = floor_to(room, launch.capture_multiple) or room
        most_filled = min(fits, room, pooled, max(default, HOST_DECODE_GRAPH))
        value = max(1, min(most_filled, launch.decode_graph_cap or most_filled))
    clamp = pool if launch.max_running_requests is not None else None
    captured = captured_requests(launch, value, clamp)
    rows = captured * launch.draft_width
    rows = rows if launch.whole_graphs else ceil_div(rows, launch.attn_tp_size)
    shown = f"{value}" if captured == value else f"{value}, captured as {captured}"
    if clamp is not None and ceil_to(clamp, launch.host_alignment) < value:
        shown = f"{value} (clamped to {captured} by the request pool)"
    room = graph_room(launch, tokens_per_rank)
    most: int | None = floor_to(room, launch.capture_multiple)
    bound = f"T{'' if launch.whole_graphs else ' x attention TP'} // draft width"
    if clamp is not None and ceil_to(clamp, launch.host_alignment) <= room:
        most, bound = None, "the request pool clamps it"
    return RowBudget(
        name="cuda_graph_max_bs_decode",
        flag="--cuda-graph-max-bs-decode",
        value=value,
        typed=launch.cuda_graph_max_bs_decode is not None,
        rows=rows,
        arithmetic=f"{shown}{_drafts(launch)}"
        + (f" = {rows} rows" if launch.whole_graphs else _over(launch, rows)),
        most=most,
        step=launch.capture_multiple,
        bound=bound,
    )
