"""Counters of what really ran, per process; read over HTTP from each scheduler's state.

Steps are counted where the host starts them, replayed ones too. The other counters stand inside
the model, and a replayed CUDA graph runs no Python: they know eager forwards and captures only.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, Protocol

from ..errors import MoePluginError, explain

logger = logging.getLogger(__name__)

Execution = Literal["replayed", "eager"]


class Observer(Protocol):
    """Told of each event as it is counted, so that nobody counts a second time."""

    def step(self, mode: str, execution: Execution, rows: int) -> None:
        """The model ran once."""

    def refusal(self) -> None:
        """The guard refused a batch."""

    def device_bytes(self, what: Literal["buffer", "workspace"], taken: int) -> None:
        """Device memory was measured, in bytes."""


class Stats:
    """Steps, layer forwards through our runner, the largest dispatch per mode, memory taken.

    Attributes:
        steps: (the host's forward mode, how it ran) -> forwards of the model.
        layer_forwards: layer id -> forwards through our experts.
        max_rows: all-to-all mode -> largest number of rows this rank dispatched.
        max_rows_any_rank: the same over all ranks, where the host says.
        dispatches: calls of dispatch so far.
        combines: calls of combine so far.
        refusals: batches above T that the guard refused.
        buffer_device_bytes: device memory that creating the buffer really took; None without one.
        workspace_device_bytes: device memory that the rows of a layer really took; None before
            the first, and where it is not measured.
        observer: whom to tell; None: nobody.
    """

    def __init__(self) -> None:
        self.steps: Counter[tuple[str, Execution]] = Counter()
        self.layer_forwards: Counter[int] = Counter()
        self.max_rows: dict[str, int] = {}
        self.max_rows_any_rank: dict[str, int] = {}
        self.dispatches = 0
        self.combines = 0
        self.refusals = 0
        self.buffer_device_bytes: int | None = None
        self.workspace_device_bytes: int | None = None
        self.observer: Observer | None = None

    def record_step(self, mode: str, execution: Execution, rows: int) -> None:
        """The model ran once, with ``rows`` of this rank in each dispatch."""
        self.steps[mode, execution] += 1
        self._tell(lambda observer: observer.step(mode, execution, rows))

    def record_refusal(self) -> None:
        """The guard refuses a batch. The process may end with it: tell before it is raised."""
        self.refusals += 1
        self._tell(lambda observer: observer.refusal())

    def record_device_bytes(self, what: Literal["buffer", "workspace"], taken: int) -> None:
        """Device memory that the buffer, or a layer's rows, took."""
        setattr(self, f"{what}_device_bytes", taken)
        self._tell(lambda observer: observer.device_bytes(what, taken))

    def _tell(self, event: Callable[[Observer], None]) -> None:
        """No step fails because an observer does, such as one whose disk is full: it is dropped."""
        if self.observer is None:
            return
        try:
            event(self.observer)
        except Exception:
            logger.warning("steps are no longer observed", exc_info=True)
            self.observer = None

    def count_layer(self, layer_id: int) -> None:
        """One forward of one MoE layer ran in our runner."""
        self.layer_forwards[layer_id] += 1

    def record_rows(self, mode: str, rows: int, rows_any_rank: int) -> None:
        """This rank dispatched ``rows``; the busiest rank ``rows_any_rank``."""
        self.max_rows[mode] = max(self.max_rows.get(mode, 0), rows)
        self.max_rows_any_rank[mode] = max(self.max_rows_any_rank.get(mode, 0), rows_any_rank)

    def check_calls(self) -> None:
        """Between two steps: as many combines as dispatches, in eager steps and in captures.

        DeepEP alternates between two buffers with each call, and a captured graph keeps those of
        its capture. An odd number would make this rank write where the others do not read.

        Raises:
            MoePluginError: a dispatch was left without its combine.
        """
        if self.dispatches != self.combines:
            raise MoePluginError(
                explain(
                    "calls of the all-to-all in the steps so far",
                    got=f"{self.dispatches} dispatches and {self.combines} combines",
                    allowed="one combine for each dispatch",
                    fix="report the model: a layer of it dispatches without combining",
                )
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain, string-keyed copy for JSON."""
        steps: dict[str, dict[str, int]] = {}
        for (mode, execution), count in sorted(self.steps.items()):
            steps.setdefault(mode, {})[execution] = count
        return {
            "steps": steps,
            "layer_forwards": {str(k): v for k, v in sorted(self.layer_forwards.items())},
            "max_rows": dict(self.max_rows),
            "max_rows_any_rank": dict(self.max_rows_any_rank),
            "refusals": self.refusals,
            "buffer_device_bytes": self.buffer_device_bytes,
            "workspace_device_bytes": self.workspace_device_bytes,
        }


STATS = Stats()
