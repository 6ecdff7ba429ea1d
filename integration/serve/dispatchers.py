"""n <= T at the dispatchers of every backend but DeepEP, before anything is sent.

DeepEP's guard stands at its buffer, which also knows normal mode (:mod:`.buffer`). The others have
buffers of their own kinds and one thing in common: the dispatcher. Its method is replaced rather
than the host's pre-dispatch hook registered, because NIXL's dispatcher does not initialise the
hooks, and because two-batch overlap calls ``dispatch_a``, which runs none.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from ...errors import HostMismatchError, explain
from ...planning.plan import Plan
from ...runtime.transports.guarded import RowGuard
from . import buffer, process


def guard_dispatchers(dispatcher: Any, plan: Plan, backend: str) -> None:
    """Guard a layer's dispatchers, each with its own T.

    Args:
        dispatcher: the host's, just built; it may hold one for each half of a batch.
        plan: of this process.
        backend: the layer's; a draft's may not be the plan's.

    Raises:
        HostMismatchError: the dispatcher's T is not the planned one.
    """
    for inner in getattr(dispatcher, "_inners", [dispatcher]):
        tokens = buffer.implementation(inner).num_max_dispatch_tokens_per_rank
        if backend == plan.capability.backend and tokens != plan.max_dispatch_tokens_per_rank:
            raise HostMismatchError(
                explain(
                    f"tokens per rank of the host's {backend} dispatcher",
                    got=tokens,
                    allowed=f"{plan.max_dispatch_tokens_per_rank}, as planned",
                    fix="start schedulers with the environment of the process that resolved the "
                    "arguments",
                )
            )
        _guard(inner, tokens)


def _guard(dispatcher: Any, tokens: int) -> None:
    # `dispatch` calls `dispatch_a` where there is one, and so does two-batch overlap.
    name = "dispatch_a" if hasattr(dispatcher, "dispatch_a") else "dispatch"
    send = getattr(dispatcher, name)
    guard = RowGuard(tokens, metadata=process.current_metadata, mode=process.current_mode)

    @wraps(send)
    def guarded(hidden_states: Any, topk_output: Any) -> Any:
        guard.check(hidden_states.shape[0])
        return send(hidden_states=hidden_states, topk_output=topk_output)

    setattr(dispatcher, name, guarded)
