"""Each attention-DP group decides by itself which CUDA graph it replays.

After the schedulers have compared their batches the host keeps the minimum of their votes: one
group that prefills takes every other one's decode graph away, and a batch that fits no prefill
graph takes those of the others. Low latency asks for less. What must agree among the ranks is the
sequence of dispatches and combines, with one T and the same experts; rows may differ, and an
expert's counts live on the device. A step runs every MoE layer once, whether it decodes, verifies,
prefills, idles, is replayed or eager. So where nothing but the all-to-all joins the groups, a
group's own votes hold.

What the other features add to a step, and why it stays the same on every rank:

- *Two-batch overlap* runs each layer twice. All groups take or leave it together, by the host's own
  comparison that stays as it is, and never in a step in which one of them prefills.
- *Speculation*: while one group prefills the others idle, and all run target and draft once. An
  idle batch has no tree there, which a captured verify reads: decode votes stay coupled, and only
  prefill graphs become a group's own. Steps of drafting and verifying are the host's as before.
- *EPLB* counts forwards, which are as many on every rank, and its recorder sums on the device.
- *Attention TP*: the ranks of a group schedule the same batches, and so vote alike.

Otherwise (``require_mlp_tp_gather`` of the host, or context parallelism, which was not looked at)
the host's coupled steps stay, eager while groups differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from ...planning.plan import Plan
from ...runtime.metadata import DPMetadata
from ...runtime.stats import STATS
from ...runtime.transports.guarded import check_tokens
from . import process


def around_all_gather(original: Callable[..., None], info: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND hook on ``MLPSyncBatchInfo.all_gather``, which each scheduler runs once per step."""
    plan = process.current_plan()
    if plan is None:
        return original(info, *args, **kwargs)
    STATS.check_calls()  # of the step before: this is the first that Python sees after it
    decode, prefill = info.can_run_decode_cuda_graph, info.can_run_prefill_cuda_graph
    original(info, *args, **kwargs)
    if plan.bounds_prefill:
        _check_all_ranks(plan, info)
    if groups_are_apart():
        if not _speculates():
            info.can_run_decode_cuda_graph = decode
        if info.num_tokens > 0:  # an idle group votes yes, and would prefill dummies
            info.can_run_prefill_cuda_graph = prefill
    return None


def _check_all_ranks(plan: Plan, info: Any) -> None:
    """Refuse a step of more than T rows on every rank, where later each knows its own rows only
    and the others would wait for the one that refuses."""
    metadata = DPMetadata.from_global_num_tokens(info.global_num_tokens, plan.attn_tp_size)
    check_tokens(metadata.max_tokens, plan.max_dispatch_tokens_per_rank, "on the busiest rank")


@cache
def groups_are_apart() -> bool:
    """Whether nothing of the model but the low-latency all-to-all joins the DP groups."""
    from sglang.srt.runtime_context import get_flags
    from sglang.srt.utils.common import require_mlp_tp_gather

    plan, host = process.current_plan(), process.host_config()
    if plan is None or not plan.all_low_latency or require_mlp_tp_gather():
        return False
    draft = getattr(host, "speculative_moe_a2a_backend", None)
    if _speculates() and draft not in (None, host.moe_a2a_backend):
        return False  # its experts are gathered over all groups
    if getattr(host, "attn_cp_size", 1) > 1:
        return False
    # What the host itself saw while it captured.
    return not getattr(get_flags().dp, "prefill_graph_has_dp_gather", False)


@cache
def _speculates() -> bool:
    return (process.host_config().speculative_algorithm or "NONE").upper() != "NONE"
