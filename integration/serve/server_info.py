"""What the plugin did in this scheduler, for ``/server_info`` -> ``internal_states``."""

from __future__ import annotations

from typing import Any

from ...runtime.stats import STATS
from ..attached_plan import plan_of


def after_get_internal_state(result: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER hook on ``Scheduler.get_internal_state``: add the key ``moe_plugin``."""
    try:
        result.internal_state["moe_plugin"] = describe(scheduler)
    except Exception as error:  # a status request must never end a server
        result.internal_state["moe_plugin"] = {"error": repr(error)}
    return result


def describe(scheduler: Any) -> dict[str, Any]:
    """Plan, forwards by the host's own count, and our counters; plain JSON types."""
    from sglang.srt.runtime_context import get_parallel

    plan = plan_of(scheduler.server_args)
    return {
        "plan": plan.as_dict() if plan is not None else None,
        "tp_rank": get_parallel().tp_rank,
        # Counted by the host: the independent side of "layers x forwards".
        "model_forwards": scheduler.tp_worker.model_runner.forward_pass_id,
        **STATS.as_dict(),
    }
