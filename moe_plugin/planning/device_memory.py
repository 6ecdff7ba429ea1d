"""Device memory of one rank: what the host keeps back, what really runs, what is left for the KV
cache.

The host takes ``usable x (1 - mem_fraction_static)`` out of what is free once the weights are
loaded, and the rest becomes the KV cache. Everything that comes later lives in that reserve:
communication buffer, workspace, graphs, activations. So ``usable x fraction = weights + KV cache``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from .facts import LaunchFacts
from .integers import ceil_div, ceil_to
from .memory_record import GIB, MIB, MemoryFacts
from .plan import Plan
from .weight_bytes import Topology, Weights

FLOOR_BYTES = 10 * GIB
"""Least reserve of the host on devices above 60 GiB."""
FLOOR_FROM_BYTES = 60 * GIB
MLA_PREFILL_GRAPHS = 3 * GIB // 2
UNSET_PREFILL_GRAPH = 2048
"""Largest prefill graph with DeepEP where nobody named one, tokens."""
TOKEN_BYTES = 3 * MIB // 2
"""Activations of one token, by the host's rule."""
DEEPEP_GUESS = 2 * GIB
BREAKABLE_GUESS = GIB
"""What the host adds for DeepEP, whatever T: with decode graphs, and with breakable prefill graphs
for the buffer of DeepEP's normal mode."""
MANY_RANKS = 2 * GIB
"""The host's slack of 128 MiB per rank stands for communicators; no more than this is believed."""


class Runtime(NamedTuple):
    """Bytes beside weights, KV cache, buffer and workspace."""

    activations: int
    graphs: int


def topology(launch: LaunchFacts, facts: MemoryFacts) -> Topology:
    """How this launch divides weights."""
    return Topology(
        ranks=launch.tp_size,
        attn_tp=launch.attention_ranks,
        stages=launch.pp_size,
        redundant_experts=launch.redundant_experts,
        whole_dense=facts.whole_dense,
        whole_head=facts.whole_head,
        whole_embedding=launch.attn_dp_size > 1,
        draft=facts.draft_loaded,
    )


def stock_topology(launch: LaunchFacts, facts: MemoryFacts) -> Topology:
    """The same for the flags that the user typed, without what a plan fills."""
    return replace(
        topology(launch, facts),
        whole_dense=launch.moe_dense_tp_size == 1,
        whole_head=launch.dp_lm_head,
    )


def draft_bytes(facts: MemoryFacts, divided: Topology) -> int:
    """A draft from another checkpoint on the rank that holds most; it spans no stages."""
    if facts.other_draft is None:
        return facts.other_draft_bytes
    # Dense models do not read the flag that holds dense layers whole.
    whole_dense = divided.whole_dense and facts.other_draft.shape.experts > 0
    divided = replace(divided, stages=1, draft=True, whole_dense=whole_dense)
    return facts.other_draft.per_rank(divided)


@cache
def prefill_sizes(largest: int) -> int:
    """Prefill graphs that the host captures up to ``largest`` tokens: multiples of 8 with DeepEP
    (``generate_prefill_cuda_graph_batch_sizes``, ``apply_deepep_adjustments``)."""
    steps = ((4, 32, 4), (48, 256, 16), (288, 512, 32), (576, 1024, 64), (1280, 4096, 256))
    sizes = {
        ceil_to(size, 8) for first, last, step in steps for size in range(first, last + 1, step)
    }
    below = sum(size <= ceil_to(largest, 8) for size in sizes)
    return below + len(range(4608, largest + 1, 512))


def pools(plan: Plan, launch: LaunchFacts) -> int:
    """Allocator pools that hold a workspace: that of captured graphs, which decode and prefill
    share, and the ordinary one for forwards that fit no graph."""
    decode_graphs = plan.bounds_decode and launch.decode_graphs
    eager = plan.runs_eagerly(launch.attn_dp_size)
    captured = decode_graphs or (plan.captures_moe_in_prefills and launch.prefill_graphs)
    return int(eager) + int(captured)


def hosts_rule(
    launch: LaunchFacts,
    facts: MemoryFacts,
    chunk: int,
    running: int,
    graph: int,
    prefill: int,
    drafts: int,
) -> Runtime:
    """The host's own estimate (``memory_hook.py: handle_gpu_memory_settings``), without its guess
    for DeepEP.

    Args:
        launch: the launch.
        facts: its memory.
        chunk: prefill chunk over all DP groups, tokens: the host divides it later.
        running: requests over all DP groups; 0 when unset.
        graph: largest captured decode batch of a DP group.
        prefill: prefill graphs, or 0.
        drafts: rows of a decoding request.
    """
    role, groups = launch.disaggregation_mode, launch.attn_dp_size
    if role == "decode":
        tokens = (running or graph or 1) * drafts
    else:
        tokens = chunk if chunk > 0 else launch.max_prefill_tokens
    activations = 512 * MIB + max(tokens, 2048) * TOKEN_BYTES
    activations += launch.tp_size * launch.pp_size * 128 * MIB
    graphs = 0
    if role != "prefill":
        graphs += 2 * MIB * graph if launch.decode_graphs else 0
        if groups > 1:
            graphs += graph * groups * (3 * MIB if graph <= 300 else 9 * MIB // 2)
    if role != "decode" and prefill:
        graphs += MLA_PREFILL_GRAPHS if facts.mla else 8 * MIB * prefill
    return Runtime(activations, graphs)


def planned_rule(plan: Plan, launch: LaunchFacts, facts: MemoryFacts, drafts: int) -> Runtime:
    """The host's estimate for the budgets of a plan, with so many rows of a decoding request."""
    # Counted by the host though none is captured.
    graph = plan.cuda_graph_max_bs_decode
    graph = graph or hosts_graph(launch, facts, plan.max_running_requests)
    chunk = plan.chunked_prefill_size or launch.chunked_prefill_size or stock_chunk(facts)
    prefill = 0
    if launch.prefill_graphs:
        largest = plan.cuda_graph_max_bs_prefill or launch.cuda_graph_max_bs_prefill
        prefill = prefill_sizes(largest or UNSET_PREFILL_GRAPH)
    rule = hosts_rule(launch, facts, chunk, plan.max_running_requests, graph, prefill, drafts)
    if not dispatches_normally(plan, launch):
        return rule
    # Mode auto: the buffer of the normal mode, which is touched while prefill graphs are captured.
    return rule._replace(graphs=rule.graphs + (BREAKABLE_GUESS if prefill else 0))


def stock_chunk(facts: MemoryFacts) -> int:
    """The prefill chunk that the host chooses by itself, over all DP groups."""
    gib = facts.device_bytes / GIB
    return 2048 if gib < 20 else 4096 if gib < 60 else 8192 if gib < 160 else 16384


def stock_graph(launch: LaunchFacts, facts: MemoryFacts, running: int) -> int:
    """The largest decode graph that the host chooses by itself; ``running`` is 0 when unset."""
    gib, few = facts.device_bytes / GIB, launch.tp_size < 4
    if gib < 20:
        size = 8
    elif gib < 60:
        size = (48 if gib < 35 else 32) if few else 160
    else:
        size = 256 if few and gib < 160 else 512
    return min(size, running or size)


def hosts_graph(launch: LaunchFacts, facts: MemoryFacts, running: int) -> int:
    """The largest decode graph that the host's estimate goes by: as typed, 0 too, or its own."""
    typed = launch.cuda_graph_max_bs_decode
    return stock_graph(launch, facts, running) if typed is None else typed


def stock_kept(launch: LaunchFacts, facts: MemoryFacts) -> int:
    """What the host alone would keep back for the flags that the user typed."""
    chunk = launch.chunked_prefill_size
    chunk = stock_chunk(facts) if chunk is None else chunk
    running = launch.max_running_requests or 0
    graph = hosts_graph(launch, facts, running)
    prefill = 0
    if launch.prefill_graphs:
        typed = launch.cuda_graph_max_bs_prefill
        prefill = prefill_sizes(UNSET_PREFILL_GRAPH if typed is None else typed)
    drafts = launch.typed_draft_tokens
    rule = hosts_rule(launch, facts, chunk, running, graph, prefill, drafts)
    if launch.backend_late:
        return above_floor(rule.activations + rule.graphs, facts)
    return with_guess(launch, facts, rule, prefill)


def with_guess(launch: LaunchFacts, facts: MemoryFacts, rule: Runtime, prefill: int) -> int:
    """The host's whole reserve: its estimate, its floor, and its guess for DeepEP."""
    role, deepep = launch.disaggregation_mode, launch.a2a_backend == "deepep"
    breakable = BREAKABLE_GUESS if deepep and prefill and role != "decode" else 0
    captured = deepep and launch.decode_graphs and role != "prefill"
    kept = above_floor(rule.activations + rule.graphs + breakable, facts)
    return kept + (DEEPEP_GUESS if captured else 0)


def above_floor(kept: int, facts: MemoryFacts) -> int:
    """The host's floor on large devices."""
    return max(kept, FLOOR_BYTES if facts.device_bytes > FLOOR_FROM_BYTES else 0)


def least_runtime(
    plan: Plan, launch: LaunchFacts, facts: MemoryFacts, weights: Weights | None, context: int
) -> Runtime:
    """What runs at the least, where the host's rule is too much to leave a KV cache: tokens of one
    DP group instead of all, and the rows that are joined by what joining them takes."""
    groups = launch.attn_dp_size
    chunk = (plan.chunked_prefill_size or launch.chunked_prefill_size or 0) // groups
    chunk = 0 if launch.disaggregation_mode == "decode" else chunk or stock_chunk(facts) // groups
    rows = plan.cuda_graph_max_bs_decode * launch.draft_width
    running = ceil_div(plan.max_running_requests, groups)
    token = token_bytes(
        plan, topology(launch, facts), weights, normal=dispatches_normally(plan, launch)
    )
    activations = 512 * MIB + int(max(chunk, rows) * token) + 4 * running * context
    activations += min(MANY_RANKS, launch.tp_size * launch.pp_size * 128 * MIB)
    graphs = 2 * MIB * plan.cuda_graph_max_bs_decode
    if weights is not None:
        joined = rows * (groups if groups > 1 and not facts.whole_head else 1)
        graphs += joined * 4 * weights.shape.vocabulary  # logits, gathered and joined
        if groups > 1 and not facts.whole_dense:
            graphs += rows * groups * 12 * weights.shape.hidden
    if launch.prefill_graphs and plan.captures_moe_in_prefills:
        sizes = prefill_sizes(plan.cuda_graph_max_bs_prefill)
        graphs += MLA_PREFILL_GRAPHS if facts.mla else 8 * MIB * sizes
    return Runtime(activations, graphs)


def dispatches_normally(plan: Plan, launch: LaunchFacts) -> bool:
    """Whether prefills go through DeepEP's normal mode: ``--deepep-mode auto``."""
    return not plan.bounds_prefill and launch.disaggregation_mode != "decode"


def token_bytes(plan: Plan, divided: Topology, weights: Weights | None, *, normal: bool) -> float:
    """Activations of one token of a DP group at the least: the widest layer's, half as much again
    for what the allocator cannot reuse; and in DeepEP's normal mode the rows that its experts
    receive, which the group's ranks have divided among them."""
    if weights is None:
        return TOKEN_BYTES
    shape = weights.shape
    heads = ceil_div(shape.heads, divided.attn_tp)
    attention = heads * (shape.head_dim + shape.v_head_dim)
    if shape.kv_lora:
        attention += heads * (2 * shape.kv_lora + shape.rope_dim)
    dense = shape.dense_intermediate if shape.dense_layers else 0
    inner = max(shape.shared_intermediate, dense if divided.whole_dense else dense // divided.ranks)
    token = 1.5 * 2 * (8 * shape.hidden + attention + 3 * inner)
    if normal:
        received = plan.top_k * (4 * shape.expert_hidden + 6 * shape.expert_intermediate)
        token += received / divided.attn_tp
    return token


def rounded_fraction(kept: int, facts: MemoryFacts) -> float:
    """The fraction that keeps at least ``kept`` bytes of usable memory: three digits, downwards."""
    return math.floor((1 - kept / facts.usable_bytes) * 1000) / 1000
