"""Ranks that would size their all-to-all differently find out before they create it."""

from __future__ import annotations

from moe_plugin.errors import ConfigError
from moe_plugin.runtime.transports.agreement import check_ranks_agree, check_room

from ..support.ranks import run_ranks


def _check(group, tokens: dict[int, int]) -> str:
    try:
        check_ranks_agree(group, {"tokens per rank": tokens[group.rank()], "hidden size": 64})
    except ConfigError as error:
        return str(error)
    return ""


def test_every_rank_raises_the_same_error() -> None:
    """Such as a variable that is set on one node only."""
    first, *others = run_ranks(3, _check, {0: 256, 1: 128, 2: 256})
    assert "tokens per rank 128 on ranks [1], 256 on ranks [0, 2]" in first
    assert "hidden size" not in first
    assert others == [first, first]


def test_ranks_that_agree() -> None:
    assert run_ranks(2, _check, {0: 256, 1: 256}) == ["", ""]


def _room(group, free: dict[int, int]) -> str:
    try:
        check_room(group, 512 << 20, free[group.rank()] << 20)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_rank_without_room_is_told_to_all() -> None:
    """The others would wait for it in the middle of NVSHMEM."""
    first, second = run_ranks(2, _room, {0: 4000, 1: 200})
    assert "200 MiB free on rank 1, allowed >= 512 MiB" in first
    assert second == first
    assert run_ranks(2, _room, {0: 512, 1: 4000}) == ["", ""]
