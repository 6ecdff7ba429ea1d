"""What the host decides about the all-to-all after budgets and memory, known before.

Waterfill and prefill context parallelism select DeepEP by themselves, models override the runner,
and one runner forces a mode. The host declares most of it in functions without side effects,
which are asked here as it asks them later; :mod:`verification` sees what was not foreseen.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from ...capability import backend_names
from ..host_checks import check_symbol
from ..host_symbols import BACKEND_OVERRIDES, MODEL_OVERRIDES, RUNNER_OVERRIDES

LOW_LATENCY_RUNNERS = frozenset({"flashinfer_cutedsl"})
"""Runners for which the host turns ``--deepep-mode auto`` into ``low_latency``."""


class Foreseen:
    """The host's live view, with fields as they will be.

    Args:
        cfg: the view.
        fields: what will be declared.
    """

    def __init__(self, cfg: Any, fields: dict[str, Any]) -> None:
        self._cfg = cfg
        self._fields = fields

    def __getattr__(self, name: str) -> Any:
        if name in self._fields:
            return self._fields[name]
        return getattr(self._cfg, name)


def foresee(server_args: Any, cfg: Any) -> Any:
    """``cfg`` as it will be when everything is resolved, as far as the host tells."""
    fields: dict[str, Any] = {}
    view = Foreseen(cfg, fields)
    waterfill = getattr(cfg, "enable_waterfill", False)
    parallel_context = getattr(cfg, "enable_prefill_cp", False)
    if not (waterfill or parallel_context or cfg.moe_a2a_backend in backend_names()):
        return cfg  # its model config may not even be readable here
    fields |= of_model(server_args)
    for symbol in (RUNNER_OVERRIDES, BACKEND_OVERRIDES):
        with _quietly():
            if check_symbol(symbol) is None:
                from sglang.srt.arg_groups import overrides

                fields |= getattr(overrides, symbol.path.rpartition(".")[2])(view)
    forced = view.moe_a2a_backend == "deepep" and view.moe_runner_backend in LOW_LATENCY_RUNNERS
    if forced and view.deepep_mode == "auto":
        fields["deepep_mode"] = "low_latency"
    return view


def of_model(server_args: Any) -> dict[str, Any]:
    """What the model's own rules will declare; nothing where they cannot be asked."""
    found: dict[str, Any] = {}
    with _quietly():
        found |= _declared(server_args)
    return found


def _declared(server_args: Any) -> dict[str, Any]:
    if check_symbol(MODEL_OVERRIDES) is not None:
        return {}
    from sglang.srt.arg_groups.overrides import (
        collect_model_override_declarations,
        model_config_of,
    )

    config = model_config_of(server_args).hf_config
    name = (config.architectures or [""])[0]
    declared = collect_model_override_declarations(name, server_args, config)
    return {field: value for _, fields in declared for field, value in fields.items()}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The host says all of it again, and raises what is wrong, when it decides."""
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.suppress(Exception):
            yield
    finally:
        logging.disable(previous)
