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
and since that kernel may leave a context to one program (Triton's does), they do where contexts
are long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import buffer
from .facts import deterministic

MOST_CONTEXT = 49152
"""Tokens of context of all requests of a group that joins. Triton's prefill kernel takes 15 us per
1,000 of them with one query each (H100, 32 heads over 4 KV heads): here 0.7 ms a layer. Eager steps
cost two and four ranks 0.8 and 1.0 ms a layer, averaged over steps that are not mixed as well."""
LONGEST_CONTEXT = 8192
"""Of one of these requests: alone it takes 60 us per 1,000 tokens."""


def around_prefill_graph_vote(original: Callable[..., bool], **kwargs: Any) -> bool:
    """AROUND hook on the host's ``_local_prefill_cuda_graph_vote``: a decoding group may say yes.

    The host's other conditions (no speculation, grammar, log-probabilities, ...) stay its own.
    """
    batch, plan = kwargs["local_batch"], buffer.current_plan()
    ours = plan is not None and plan.captures_prefill and not deterministic(buffer.host_config())
    joins = ours and batch is not None and batch.forward_mode.is_decode() and _is_short(batch)
    if not joins:
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


def _is_short(batch: Any) -> bool:
    if batch.seq_lens_cpu is None:  # the host keeps none with speculation
        return False
    contexts = batch.seq_lens_cpu[: batch.batch_size()].tolist()
    return sum(contexts) <= MOST_CONTEXT and max(contexts, default=0) <= LONGEST_CONTEXT
