"""The way out of batched data-parallel MoE that is always open: to run without it."""

from __future__ import annotations

from .plan import Change, Rejection

LEAVE: tuple[Change, ...] = (
    ("--moe-a2a-backend", "none"),
    ("--deepep-mode", None),
    ("--use-batched-dp-moe", "off"),
    ("--enable-waterfill", None),
)
"""Changes that leave batched data-parallel MoE altogether."""
LEAVE_TEXT = "run without it: --moe-a2a-backend none --use-batched-dp-moe off"
USE_DEEPEP: tuple[Change, ...] = (
    ("--moe-a2a-backend", "deepep"),
    ("--deepep-mode", "low_latency"),
)
"""Changes after which DeepEP carries the rows instead of another backend."""
LOW_LATENCY: tuple[Change, ...] = (("--deepep-mode", "low_latency"),)


def leave(limit: str, got: str, allowed: str, *, host_runs: bool = False) -> Rejection:
    """A rejection whose only fix is to leave."""
    return Rejection(limit, got, allowed, LEAVE_TEXT, LEAVE, "unsupported", host_runs)


def use_deepep(limit: str, got: str, allowed: str, host_runs: bool = False) -> Rejection:
    """A rejection that another backend than this one helps against."""
    fix = " ".join(f"{name} {value}" for name, value in USE_DEEPEP)
    return Rejection(limit, got, allowed, fix, USE_DEEPEP, "unsupported", host_runs)
