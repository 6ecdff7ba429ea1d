"""Counters of what really ran, per process; read over HTTP from each scheduler's state.

Python counts eager forwards and graph captures. A replayed CUDA graph runs no Python: there the
counters stand still, which is what a captured layer means.
"""

from __future__ import annotations

from collections import Counter
from typing import Any


class Stats:
    """Layer forwards through our runner, and the largest dispatch per forward mode.

    Attributes:
        layer_forwards: layer id -> forwards through our experts.
        max_rows: forward mode -> largest number of rows this rank dispatched.
        max_rows_any_rank: the same over all ranks, where the host says.
        buffer_device_bytes: device memory that creating the buffer really took; None without one.
    """

    def __init__(self) -> None:
        self.layer_forwards: Counter[int] = Counter()
        self.max_rows: dict[str, int] = {}
        self.max_rows_any_rank: dict[str, int] = {}
        self.buffer_device_bytes: int | None = None

    def count_layer(self, layer_id: int) -> None:
        """One forward of one MoE layer ran in our runner."""
        self.layer_forwards[layer_id] += 1

    def record_rows(self, mode: str, rows: int, rows_any_rank: int) -> None:
        """This rank dispatched ``rows``; the busiest rank ``rows_any_rank``."""
        self.max_rows[mode] = max(self.max_rows.get(mode, 0), rows)
        self.max_rows_any_rank[mode] = max(self.max_rows_any_rank.get(mode, 0), rows_any_rank)

    def as_dict(self) -> dict[str, Any]:
        """Plain, string-keyed copy for JSON."""
        return {
            "layer_forwards": {str(k): v for k, v in sorted(self.layer_forwards.items())},
            "max_rows": dict(self.max_rows),
            "max_rows_any_rank": dict(self.max_rows_any_rank),
            "buffer_device_bytes": self.buffer_device_bytes,
        }


STATS = Stats()
