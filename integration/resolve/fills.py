"""Which of the planned values are declared: those that the user left unset, and lowered caps."""

from __future__ import annotations

from typing import Any

from ...planning.plan import Plan
from .graph_facts import explicit_graph_max

SOURCE = "moe_plugin"
"""Who declares them, in the host's log of resolutions."""


def fills_of(server_args: Any, plan: Plan) -> dict[str, int]:
    """The values that the user left unset, and the cap that the plan lowered, as declarations."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    cfg = resolving_view(server_args)
    fills: dict[str, int] = {}
    if plan.bounds_prefill:
        if server_args.chunked_prefill_size is None:
            fills["chunked_prefill_size"] = plan.chunked_prefill_size
        typed = explicit_graph_max(server_args, "prefill", plan.capability.backend)
        if plan.cuda_graph_max_bs_prefill and typed is None:
            fills["cuda_graph_max_bs_prefill"] = plan.cuda_graph_max_bs_prefill
    running = plan.max_running_requests
    if plan.bounds_decode and running and server_args.max_running_requests != running:
        fills["max_running_requests"] = running
    if plan.cuda_graph_max_bs_decode and explicit_graph_max(server_args, "decode") is None:
        fills["cuda_graph_max_bs_decode"] = plan.cuda_graph_max_bs_decode
    if plan.groups_apart:
        if cfg.moe_dense_tp_size is None:
            fills["moe_dense_tp_size"] = 1
        if not cfg.enable_dp_lm_head:
            fills["enable_dp_lm_head"] = True
    if plan.mixed_chunk and not cfg.enable_mixed_chunk:
        fills["enable_mixed_chunk"] = True
    return {name: value for name, value in fills.items() if hasattr(cfg, name)}
