"""Load formats that hand over parameters as another server holds them, not as checkpoints have
them: where our experts repack their weights, such parameters are of another shape.

Read in SGLang's ``model_loader`` and ``weight_cache``: these repack memory that nothing was loaded
into, or nothing at all. Dummy weights are repacked like loaded ones, and so are those of a plain
checkpoint in a remote file store (``RemoteModelLoader``).
"""

from __future__ import annotations

from .facts import LaunchFacts, ModelFacts
from .leaving import LEAVE, LEAVE_TEXT
from .plan import Change, Rejection
from .weight_formats import FORMATS

_COPIES = frozenset({"presharded", "remote_instance"})


def check_load_format(model: ModelFacts, launch: LaunchFacts) -> list[Rejection]:
    """What cannot load experts whose weights ours repack."""
    known = FORMATS.get(model.weight_format)
    if known is None or known.own is None or not known.own.repacks:
        return []
    errors = []
    # Here the model path is that of the dump, which no other load format reads.
    stored = launch.load_format == "remote" and launch.key_value_store
    if stored or launch.load_format == "sharded_state":
        fix = f"the checkpoint itself with --load-format auto, or {LEAVE_TEXT}"
        errors.append(_refused(model, f"--load-format {launch.load_format}", fix, LEAVE))
    elif launch.load_format in _COPIES:
        change = ("--load-format", "auto")
        got = f"--load-format {launch.load_format}"
        errors.append(_refused(model, got, " ".join(change), (change,)))
    if launch.weight_cache:
        change = ("--weight-cache-mode", "off")
        errors.append(_refused(model, "--weight-cache-mode", " ".join(change), (change,)))
    return errors


def _refused(model: ModelFacts, got: str, fix: str, changes: tuple[Change, ...]) -> Rejection:
    return Rejection(
        "load format",
        got=f"{got} with {model.weight_format} weights",
        allowed="formats that read the checkpoint itself, or dummy: the plugin repacks these",
        fix=fix,
        changes=changes,
        kind="unsupported",
    )
