"""Rows that one rank dispatches in one forward, from the host's scheduling rules. Integers only.

"Group" is one attention-DP group: one scheduler, whose rows are scattered over its attention-TP
ranks before every MoE layer. Sources are paths below ``sglang/srt``.
"""

from __future__ import annotations


def ceil_div(value: int, by: int) -> int:
    """Smallest integer >= value / by."""
    return -(-value // by)


def floor_to(value: int, multiple: int) -> int:
    """Largest multiple of ``multiple`` that is <= value."""
    return value // multiple * multiple


def ceil_to(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is >= value."""
    return ceil_div(value, multiple) * multiple


def chunk_per_group(raw_chunk: int, attn_dp_size: int) -> int:
    """Chunk of one group: the host floor-divides what the user typed.

    ``arg_groups/parallel_hook.py: handle_data_parallelism``. 0 means that chunking is off.
    """
    return max(0, raw_chunk // attn_dp_size)


def prefill_tokens_per_group(
    chunk: int, *, dynamic_chunking: bool, pp_size: int, max_prefill_tokens: int
) -> int:
    """Most tokens one prefill forward of a group holds, for a chunk > 0.

    ``PrefillAdder`` admits at most the chunk, mixed decode rows included. Pipeline dynamic
    chunking grows it up to ``max_prefill_tokens`` and probes at 1.25 times the chunk
    (``arg_groups/overrides.py: max_prefill_buffer_tokens``).
    """
    if dynamic_chunking and pp_size > 1:
        return max(chunk, max_prefill_tokens, ceil_div(5 * chunk, 4))
    return chunk


def requests_per_group(max_running_requests: int, attn_dp_size: int) -> int:
    """Running requests of one group (``kv_cache_configurator.py: resolve_max_num_reqs``)."""
    return max(1, max_running_requests // attn_dp_size)


def captured_requests(graph_max: int, pool: int, alignment: int) -> int:
    """Largest batch a decode graph is captured at.

    ``base_cuda_graph_runner.py: get_batch_sizes_to_capture`` clamps the list to the request
    pool, but rounds the pool *up* to the alignment first. Slots that a decode-only instance adds
    for transfers are not counted in the pool's size.
    """
    return min(graph_max, ceil_to(pool, alignment))
