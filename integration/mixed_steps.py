"""Steps in which one attention-DP group prefills while another decodes.

With an all-to-all the host runs such a step eagerly on every rank. Without one it lets the groups
that decode view their requests as prefills of one token, and every group replays a prefill graph.
Under a plan whose dispatches are all low latency the layers in those graphs are the same as in
decode graphs, and groups may differ in rows: the same is possible.

The host's reason not to is accuracy: replays of small buckets were seen to amplify how an
all-to-all's logits drift (sglang#30898). Whether that holds for low latency has to be settled
before this is on by default: docs/several-gpus.md says what is known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import buffer


def around_prefill_graph_vote(original: Callable[..., bool], **kwargs: Any) -> bool:
    """AROUND hook on the host's ``_local_prefill_cuda_graph_vote``: a decoding group may say yes.

    The host's other conditions (no speculation, grammar, log-probabilities, ...) stay its own.
    """
    batch, plan = kwargs["local_batch"], buffer.current_plan()
    ours = plan is not None and plan.captures_prefill
    if not (ours and batch is not None and batch.forward_mode.is_decode()):
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
