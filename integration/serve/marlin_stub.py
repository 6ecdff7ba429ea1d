"""The host's Marlin runner behind an all-to-all: there so that layers of packed weights are built.

Their experts are ours, which stand before it in every forward.
"""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedError, explain
from ...planning.leaving import LEAVE_TEXT
from ..host_checks import check_symbol
from ..scheduler_symbols import FUSED_FUNCTION

_RUNNER = "marlin"


def register_marlin_stub(backend: str) -> None:
    """Give the host's Marlin runner a function behind this all-to-all: without one it refuses to be
    built, and with it the layer."""
    if check_symbol(FUSED_FUNCTION) is not None:
        return
    from sglang.srt.layers.moe.moe_runner.base import FusedOpPool

    if FusedOpPool.get_fused_func(backend, _RUNNER) is None:
        FusedOpPool.register_fused_func(backend, _RUNNER, refuse_rows)


def refuse_rows(dispatch_output: Any, *_: Any) -> Any:
    """The host's Marlin runner where our experts do not stand before it.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        explain(
            "experts of packed weights behind an all-to-all",
            got=type(dispatch_output).__name__,
            allowed="low-latency rows, which the plugin's experts take",
            fix=LEAVE_TEXT,
        )
    )
