"""Symbols of the host's weight updates; `host_symbols.SYMBOLS` has them too."""

from __future__ import annotations

from .host_symbol import HostSymbol

_HALF_WRITTEN = "a weight update that restores no 4-bit experts may leave a half-written model"
_REFUSES = "refuse updates of repacked 4-bit weights outside a session"
_RESTORES = "the host restores weights before every update of any kind"
LOAD_WEIGHTS = HostSymbol(
    "model_loader.loader.DefaultModelLoader.load_weights_only",
    ("model", "weights", "target_device"),
    "give the host back 4-bit weights that were repacked, before an update from disk loads",
    _RESTORES,
    runtime=True,
    without=_HALF_WRITTEN,
)
TENSOR_UPDATE = HostSymbol(
    "model_executor.model_runner_components.weight_updater.WeightUpdater"
    ".update_weights_from_tensor",
    ("self", "named_tensors", "load_format"),
    _REFUSES,
    _RESTORES,
    runtime=True,
    without=_HALF_WRITTEN,
)
IPC_UPDATE = HostSymbol(
    "model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_ipc",
    ("self", "recv_req"),
    _REFUSES,
    _RESTORES,
    runtime=True,
    without=_HALF_WRITTEN,
)
DISTRIBUTED_UPDATE = HostSymbol(
    "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    ".update_weights_from_distributed",
    ("self", "recv_req"),
    _REFUSES,
    _RESTORES,
    runtime=True,
    without=_HALF_WRITTEN,
)
DISTRIBUTED_ANSWER = HostSymbol(
    "managers.io_struct.UpdateWeightsFromDistributedReqOutput",
    (),
    "answer an update that is refused",
    _RESTORES,
    runtime=True,
    without=_HALF_WRITTEN,
)

UPDATE_SYMBOLS = (
    LOAD_WEIGHTS, TENSOR_UPDATE, IPC_UPDATE, DISTRIBUTED_UPDATE, DISTRIBUTED_ANSWER,
)  # fmt: skip
