"""Steps in which one attention-DP group prefills while another decodes.

With an all-to-all the host runs such a step eagerly on every rank. Without one it lets the groups
that decode view their requests as prefills of one token, and every group replays a prefill graph.
Under a plan whose dispatches are all low latency the layers in those graphs are the same as in
decode graphs, and groups may differ in rows: the same is possible.

The host's reason not to is that replays of small buckets amplify how an all-to-all's logits drift
(sglang#30898). Ours do not: with one launch of the experts a row gets the same bits alone, among
others and in a replay (case `same bits` of tests/gpu/cases.py), and answers under load are as
likely with such replays as without (docs/several-gpus.md).

A converted request is read by the kernel of prefills. Where bits must not depend on the batch
(deterministic inference), these steps stay the host's, as with `MOE_PLUGIN_REPLAY_MIXED_STEPS=0`;
and since Triton's kernel leaves a context to one program per head, they do where it is the backend
and contexts are long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...planning.plan import Plan
from ..resolve.launch_facts import deterministic, prefill_attention
from . import buffer

MOST_READ = 49152 * 32 * 256
"""Tokens of context x heads x channels of K and V that a joining group may have in all. With one
query each Triton's kernel takes 15 us per 1,000 tokens of 32 heads and 256 channels (H100): here
0.7 ms a layer. Eager steps cost 0.8 and 1.0 ms a layer on two and four ranks, averaged over all."""
LONGEST_READ = 8192 * 256
"""Tokens x channels of one of its requests, which takes 60 us per 1,000 tokens if it is alone."""


def around_prefill_graph_vote(original: Callable[..., bool], **kwargs: Any) -> bool:
    """AROUND hook on the host's ``_local_prefill_cuda_graph_vote``: a decoding group may say yes.

    The host's other conditions (no speculation, grammar, log-probabilities, ...) stay its own.
    """
    batch, plan = kwargs["local_batch"], buffer.current_plan()
    decodes = batch is not None and batch.forward_mode.is_decode()
    if plan is None or not (plan.captures_prefill and decodes and _may_join(plan, **kwargs)):
        return original(**kwargs)
    from sglang.srt.layers.moe.utils import MoeA2ABackend
    from sglang.srt.managers.scheduler_components import dp_attn

    # The vote asks for the all-to-all just to refuse it; the scheduler runs in one thread.
    asked = dp_attn.get_moe_a2a_backend
    dp_attn.get_moe_a2a_backend = lambda: MoeA2ABackend.NONE
    try:
        return original(**kwargs)
    finally:
        dp_attn.get_moe_a2a_backend = asked


def _may_join(plan: Plan, local_batch: Any, model_config: Any, **_: Any) -> bool:
    host = buffer.host_config()
    if deterministic(host):
        return False
    if prefill_attention(host) != "triton":
        return True
    if local_batch.seq_lens_cpu is None:  # the host keeps none with speculation
        return False
    contexts = local_batch.seq_lens_cpu[: local_batch.batch_size()].tolist()
    heads = model_config.num_attention_heads // plan.attn_tp_size
    if rank := getattr(model_config, "kv_lora_rank", None):  # absorbed in graphs
        channels = 2 * rank + model_config.qk_rope_head_dim
    else:
        channels = model_config.head_dim + model_config.v_head_dim
    most, longest = sum(contexts) * heads * channels, max(contexts, default=0) * channels
    return most <= MOST_READ and longest <= LONGEST_READ
