"""Counters of what really ran, per process; read over HTTP from each scheduler's state.

Python counts eager forwards and graph captures. A replayed CUDA graph runs no Python: there the
counters stand still, which is what a captured layer means.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..errors import MoePluginError, explain


class Stats:
    """Layer forwards through our runner, and the largest dispatch per forward mode.

    Attributes:
        layer_forwards: layer id -> forwards through our experts.
        max_rows: forward mode -> largest number of rows this rank dispatched.
        max_rows_any_rank: the same over all ranks, where the host says.
        dispatches: calls of dispatch so far.
        combines: calls of combine so far.
        buffer_device_bytes: device memory that creating the buffer really took; None without one.
    """

    def __init__(self) -> None:
        self.layer_forwards: Counter[int] = Counter()
        self.max_rows: dict[str, int] = {}
        self.max_rows_any_rank: dict[str, int] = {}
        self.dispatches = 0
        self.combines = 0
        self.buffer_device_bytes: int | None = None

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
        return {
            "layer_forwards": {str(k): v for k, v in sorted(self.layer_forwards.items())},
            "max_rows": dict(self.max_rows),
            "max_rows_any_rank": dict(self.max_rows_any_rank),
            "buffer_device_bytes": self.buffer_device_bytes,
        }


STATS = Stats()
