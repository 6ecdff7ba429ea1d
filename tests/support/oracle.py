"""Rows per rank by the host's own code: admission, request pool, capture list. Not our formulas.

Imported by the worker process when a case asks for it: it loads model code.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

from sglang.srt.managers import schedule_policy
from sglang.srt.mem_cache.allocator import base as allocator_base
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.model_executor.runner.base_cuda_graph_runner import get_batch_sizes_to_capture

ROOMY = 1 << 40
"""KV tokens: memory never limits admission here, so the budgets alone must."""


def _allocator(page_size: int) -> Any:
    allocator = SimpleNamespace(page_size=page_size, available_size=lambda: ROOMY)
    allocator.create_prefill_budget = lambda tree, **kw: (
        allocator_base.BaseTokenToKVPoolAllocator.create_prefill_budget(allocator, tree, **kw)
    )
    allocator.request_slot_reserve = lambda **_: 0
    return allocator


def _tree() -> Any:
    tree = mock.MagicMock()
    tree.supports_mamba.return_value = False
    tree.evictable_size.return_value = 0
    tree.disable = False
    return tree


class _Request(SimpleNamespace):
    """What admission reads of a request: a prompt without any cached prefix."""

    @property
    def extend_len(self) -> int:
        return self.extend_end - self.prefix_len


def _request(length: int) -> Any:
    return _Request(
        full_untruncated_fill_ids=range(length),
        prefix_len=0,
        extend_end=length,
        output_ids=[],
        sampling_params=SimpleNamespace(max_new_tokens=16, ignore_eos=False),
        retracted_stain=False,
        kv=SimpleNamespace(holds_mamba=True, req_pool_idx=None),
        host_hit_length=0,
        swa_host_hit_length=0,
        auxiliary_swa_host_hit_length=0,
        mamba_host_hit_length=0,
        last_node=None,
        needs_host_load_back=lambda: False,
        storage_hit_length=0,
        storage_hit_start=0,
        host_loaded_length=0,
        host_hit_is_storage=False,
        materialized_host_hit_len=lambda: 0,
        storage_hit_len=0,
        fulfilled_storage_hit_len=lambda _prefix: 0,
        cache_request_handle=None,
        lora_id=None,
        rid="r",
    )


def prefill_tokens(view: Any, lengths: list[int], running: int) -> int:
    """Tokens of one prefill forward of a DP group: admitted, plus mixed decode rows."""
    mixed = running if view.enable_mixed_chunk else 0
    chunk = view.chunked_prefill_size if view.chunked_prefill_size > 0 else None
    adder = schedule_policy.PrefillAdder(
        view.page_size,
        _tree(),
        _allocator(view.page_size),
        None,
        1.0,
        view.max_prefill_tokens,
        chunk,
        num_mixed_decode_tokens=mixed,
    )
    continued = None
    if lengths and chunk is not None:
        # A prompt that was cut in an earlier pass goes on first.
        continued = adder.add_chunked_req(_request(lengths[0]))
        lengths = lengths[1:]
    for length in lengths:
        result = adder.add_one_req(_request(length), continued is not None, None)
        if result is not schedule_policy.AddReqResult.CONTINUE:
            break
    admitted = sum(request.extend_len for request in adder.can_run_list)
    for request in adder.can_run_list:
        assert request.extend_len >= 0, "a chunk of zero or less"
    return admitted + mixed


def rows_of(server_args: Any, lengths: list[int]) -> dict[str, int]:
    """Largest rows per rank of every forward mode, for one resolved launch."""
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.arg_groups.overrides import (
        max_prefill_buffer_tokens,
        max_speculative_num_draft_tokens,
    )
    from sglang.srt.runtime_context import get_parallel, publish

    publish(server_args, role="scheduler")
    view = resolved_view(server_args)
    scatter = get_parallel().attn_tp_size
    width = 1
    if view.speculative_algorithm:
        width = max_speculative_num_draft_tokens(server_args) or 1
        if view.speculative_algorithm != "NGRAM":
            width = max(width, view.speculative_eagle_topk or 1)
    pool = KVCacheConfigurator.resolve_max_num_reqs(
        SimpleNamespace(
            model_config=SimpleNamespace(context_len=4096),
            attn_dp_size=view.attn_dp_size,
            mambaish_config=None,
        ),
        ROOMY,
    )
    rows = {"decode": -(-pool * width // scatter)}
    config = view.cuda_graph_config
    if config.decode.backend != "disabled":
        runner = SimpleNamespace(
            req_to_token_pool=SimpleNamespace(size=pool), server_args=server_args
        )
        captured, _ = get_batch_sizes_to_capture(runner, width)
        rows["decode_graph"] = -(-max(captured) * width // scatter)
    # Instances with a role run only one of the two, so nothing rides along with chunks.
    running = pool if view.disaggregation_mode == "null" else 0
    tokens = prefill_tokens(view, lengths, min(running, len(lengths)))
    rows["prefill"] = -(-tokens // scatter)
    rows["mixed"] = -(-prefill_tokens(view, lengths, running) // scatter)
    rows["prefill_buffer"] = -(-max_prefill_buffer_tokens(server_args) // scatter)
    if config.prefill.backend != "disabled" and config.prefill.bs:  # none fits a chunk of -1
        rows["prefill_graph"] = -(-max(config.prefill.bs) // scatter)
    return rows


def runs_of(server_args: Any) -> int:
    """Bytes that the host's own rule has for activations and graphs, at the values it resolved:
    ``handle_gpu_memory_settings``, for the chunk of one DP group, without floor and DeepEP."""
    from sglang.srt.arg_groups.memory_hook import reserve_for_graph_mb
    from sglang.srt.arg_groups.model_override_base import resolved_view

    view = resolved_view(server_args)
    if view.disaggregation_mode == "decode":
        requests = view.max_running_requests or view.cuda_graph_config.decode.max_bs or 1
        tokens = requests * (view.speculative_num_draft_tokens or 1)
    else:
        chunk = view.chunked_prefill_size
        tokens = chunk if chunk > 0 else view.max_prefill_tokens
    mib = 512 + max(tokens, 2048) * 1.5 + view.tp_size * view.pp_size * 128
    return int((mib + reserve_for_graph_mb(server_args)) * 2**20)


def layout_of(server_args: Any) -> dict[str, Any]:
    """What the host really builds: layer class, and the layout of extend and decode batches."""
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
    from sglang.srt.layers.moe.utils import (
        DeepEPMode,
        get_moe_a2a_backend,
        initialize_moe_config,
    )
    from sglang.srt.runtime_context import publish

    publish(server_args, role="scheduler")
    initialize_moe_config()
    view = resolved_view(server_args)
    mode = DeepEPMode(view.deepep_mode)
    backend = get_moe_a2a_backend()
    bounded = backend.is_deepep_v2()  # by T in every forward, whatever the mode
    low_latency = backend.is_nixl() or backend.is_mooncake() or backend.is_pplx()
    by_mode = backend.is_deepep() or low_latency
    return {
        "layer": get_moe_impl_class(None).__name__,
        # Their dispatchers raise NotImplementedError for a mode that may be normal.
        "builds": not (low_latency and mode.enable_normal()),
        "batched": {
            "extend": bounded or (by_mode and mode.resolve(True).is_low_latency()),
            "decode": bounded or (by_mode and mode.resolve(False).is_low_latency()),
        },
    }


def capability_of(server_args: Any) -> dict[str, Any]:
    """The plugin's answer for the same resolved launch."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    from moe_plugin.integration.resolve.launch_plan import capability_for

    view = resolved_view(server_args)
    answer = capability_for(server_args, view, view.moe_a2a_backend, view.deepep_mode)
    return {"ok": answer.ok, "modes": sorted(mode.value for mode in answer.modes)}
