"""Every rank of an all-to-all must size it alike; none can tell by itself that others do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError, explain


def check_ranks_agree(group: Any, values: Mapping[str, int]) -> None:
    """Compare ``values`` over the ranks of a ``torch.distributed`` group. Collective.

    Buffers of different T would make ranks write where others do not read: wrong rows or a hang.

    Args:
        group: the all-to-all's.
        values: what must be equal, by name.

    Raises:
        ConfigError: on every rank, naming each value that differs and who has it.
    """
    import torch.distributed as dist

    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, dict(values), group=group)
    ranks: dict[str, dict[int, list[int]]] = {}
    for rank, theirs in enumerate(found):
        for name, value in theirs.items():
            ranks.setdefault(name, {}).setdefault(value, []).append(rank)
    differing = {name: by_value for name, by_value in ranks.items() if len(by_value) > 1}
    if not differing:
        return
    got = "; ".join(
        f"{name} " + ", ".join(f"{value} on ranks {who}" for value, who in sorted(by_value.items()))
        for name, by_value in differing.items()
    )
    raise ConfigError(
        explain(
            "one all-to-all for all ranks",
            got=got,
            allowed="the same on every rank",
            fix="the same flags and variables on every node",
        )
    )
