"""For comparison: the host's standard Triton fused MoE, on tokens instead of a batched layout."""

from functools import cache
from typing import Any

import torch

from moe_plugin.kernels.formats import SCALE_BLOCK


def tokens_of(experts: int, rows: int, top_k: int) -> int | None:
    """Tokens that give every expert `rows` rows when each visits `top_k` of them (or all there
    are); None where that does not divide."""
    tokens, rest = divmod(rows * experts, min(top_k, experts))
    return None if rest else tokens


def routed_tokens(
    experts: int, rows: int, top_k: int, hidden: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(hidden states [n, H] bf16, weights [n, k] float32, ids [n, k] int32), or None."""
    tokens = tokens_of(experts, rows, top_k)
    if tokens is None:
        return None
    k = min(top_k, experts)
    ids = torch.arange(tokens * k, dtype=torch.int32, device="cuda").view(tokens, k) % experts
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    return x, torch.full((tokens, k), 1 / k, device="cuda"), ids


@cache
def publish_host_config() -> Any:
    """The host's kernels read its process-wide configuration: publish the defaults, one rank.
    Holds until the result, which this cache keeps, is dropped."""
    from sglang.srt.runtime_context import get_parallel, publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="none", device="cuda"), role="scheduler")
    held = get_parallel().override(tp_group=None)
    held.__enter__()
    return held


def fused_call(layer: tuple[Any, ...], routed: tuple[Any, ...]) -> torch.Tensor:
    """One layer, sums over top-k included, as the host runs it without an all-to-all."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_experts_impl

    publish_host_config()
    _x, x_scale, experts = layer
    x, weights, ids = routed
    fp8 = {"use_fp8_w8a8": True, "w1_scale": experts.w13_scale, "w2_scale": experts.w2_scale,
           "block_shape": [SCALE_BLOCK, SCALE_BLOCK]}  # fmt: skip
    return fused_experts_impl(
        x,
        experts.w13,
        experts.w2,
        weights,
        ids,
        filter_expert=False,
        **({} if x_scale is None else fp8),
    )
