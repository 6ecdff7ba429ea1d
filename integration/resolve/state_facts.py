"""Caches that are not so many bytes for each token: states of linear attention, sliding windows."""

from __future__ import annotations

from typing import Any

from .launch_facts import attn_dp_size

STATES_TO_TOKENS = 0.9
"""``--mamba-full-memory-ratio`` where neither the user nor the model names one."""


def tokens_are_alike(server_args: Any, cfg: Any) -> bool:
    """Whether the host's KV cache is one pool, in which every token takes the same bytes."""
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.configs.hybrid_arch import mambaish_config

    model = model_config_of(server_args)
    if getattr(model, "is_hybrid_swa", False) or getattr(cfg, "enable_hisparse", False):
        return False
    return mambaish_config(model) is None


def state_of_a_request(server_args: Any, cfg: Any) -> tuple[int, float]:
    """(bytes on a rank of the states of one request, share of the KV cache that states get by
    themselves); zeros where running requests do not decide how many states there are.

    They do without a radix cache: one is then allocated for each, whatever memory there is
    (``kv_cache_configurator.py: _handle_max_mamba_cache``). Of several pipeline stages one counts
    as if it held all layers.
    """
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.runtime_context import get_parallel

    if not cfg.disable_radix_cache or cfg.max_mamba_cache_size is not None:
        return 0, 0.0
    config = mambaish_config(model_config_of(server_args))
    if config is None:
        return 0, 0.0
    with get_parallel().override(**_widths(cfg)):
        size = int(config.mamba2_cache_params.mamba_cache_per_req)
    ratio = cfg.mamba_full_memory_ratio
    ratio = STATES_TO_TOKENS if ratio is None else float(ratio)
    return size, ratio / (1 + ratio)


def _widths(cfg: Any) -> dict[str, int]:
    """How the launch divides its ranks. All that belong together: none is published yet, or those
    of another launch are."""
    ranks, dp_groups = cfg.tp_size, attn_dp_size(cfg)
    context = max(1, int(getattr(cfg, "attn_cp_size", 1) or 1))
    experts_apart = max(1, int(getattr(cfg, "moe_dp_size", 1) or 1))
    widths = {
        "tp_size": ranks,
        "attn_tp_size": max(1, ranks // dp_groups // context),
        "attn_dp_size": dp_groups,
        "attn_cp_size": context,
        "moe_ep_size": ranks // experts_apart,
        "moe_dp_size": experts_apart,
        "moe_tp_size": 1,
    }
    if hasattr(cfg, "enable_cp_tp_group_sharing"):
        widths["enable_cp_tp_group_sharing"] = bool(cfg.enable_cp_tp_group_sharing)
    return widths
