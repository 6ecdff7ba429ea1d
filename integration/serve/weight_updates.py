"""Weight updates of the host's, where 4-bit experts are repacked.

The host restores what its methods repacked in some updates, and never on its oldest version. So a
load restores for itself, and an update that neither restores nor repacks is refused before it
writes anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import explain
from .packed_weights import is_repacked, restore


def before_load(model: Any, *_: Any, **_kwargs: Any) -> None:
    """BEFORE hook on ``DefaultModelLoader.load_weights_only``, which an update from disk passes,
    its rollback too; the host repacks afterwards."""
    for layer in filter(is_repacked, model.modules()):
        restore(layer)


def around_update(original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND hook on ``WeightUpdater.update_weights_from_tensor`` and ``_from_ipc``."""
    refusal = _refusal([updater.get_model()])
    return (False, refusal) if refusal else original(updater, *args, **kwargs)


def around_distributed_update(original: Callable[..., Any], manager: Any, recv_req: Any) -> Any:
    """AROUND hook on ``SchedulerWeightUpdaterManager.update_weights_from_distributed``; what joins
    the broadcast below it has another name in each host."""
    from sglang.srt.managers.io_struct import UpdateWeightsFromDistributedReqOutput

    select = getattr(manager, "_select_runners", None)
    if select is None:  # hosts without sessions, which update the target alone
        runners = [manager.tp_worker.model_runner]
    elif getattr(manager, "_session", None) is None:
        return original(manager, recv_req)  # the host refuses it by itself
    else:
        runners = [runner for _, runner in select(recv_req.selector)]
    refusal = _refusal([runner.model for runner in runners])
    if refusal:
        return UpdateWeightsFromDistributedReqOutput(success=False, message=refusal)
    return original(manager, recv_req)


def _refusal(models: list[Any]) -> str | None:
    """Why these models cannot be written to as they are, or None."""
    if not any(is_repacked(layer) for model in models for layer in model.modules()):
        return None
    return explain(
        "weight update",
        got="4-bit experts, repacked for the plugin's kernels",
        allowed="between /begin_weight_update and /end_weight_update of these models, or from disk",
        fix="call /begin_weight_update first, where this SGLang has it, or "
        "/update_weights_from_disk; nothing was written",
    )
