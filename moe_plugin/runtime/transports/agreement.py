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


def check_room(group: Any, needed: int, free: int) -> None:
    """Compare free device memory with what the buffer takes at least, on all ranks. Collective.

    A rank whose allocation fails inside NVSHMEM ends its process, and its peers wait for it.

    Args:
        group: the all-to-all's.
        needed: bytes per rank without which the allocation cannot succeed.
        free: bytes of this rank's device.

    Raises:
        ConfigError: on every rank, naming those that have too little.
    """
    import torch.distributed as dist

    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, free, group=group)
    short = {rank: bytes_free for rank, bytes_free in enumerate(found) if bytes_free < needed}
    if not short:
        return
    raise ConfigError(
        explain(
            "device memory for the all-to-all's buffer",
            got=", ".join(f"{have >> 20} MiB free on rank {rank}" for rank, have in short.items()),
            allowed=f">= {needed >> 20} MiB",
            fix="end what else uses these GPUs, or lower --mem-fraction-static or "
            "--batched-dp-moe-max-tokens",
        )
    )
