"""Integer division and rounding, as budgets and bytes need them."""

from __future__ import annotations


def ceil_div(value: int, by: int) -> int:
    """Smallest integer >= value / by."""
    return -(-value // by)


def floor_to(value: int, multiple: int) -> int:
    """Largest multiple of ``multiple`` that is <= value."""
    return value // multiple * multiple


def ceil_to(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is >= value."""
    return ceil_div(value, multiple) * multiple
