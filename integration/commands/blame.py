"""Whose exception it is: a refusal of SGLang's, a crash of SGLang's, or a fault of ours."""

from __future__ import annotations

import traceback
from types import FrameType

from ...errors import MoePluginError
from ...planning.plan import Rejection
from .. import host_checks

_OURS, _HOST = "moe_plugin", "sglang"
_DELIBERATE = (AssertionError, ImportError, NotImplementedError, OSError, RuntimeError, ValueError)
"""What the host raises to refuse; anything else of its is a crash, and its place helps."""


class InternalError(MoePluginError):
    """A fault of this plugin's own, found while a launch was planned."""


def raised_by_us(error: BaseException) -> bool:
    """Whether our code is closer to the point of failure than the host's.

    Libraries that either of both called do not count: the innermost frame of one of the two does.
    """
    frames: list[FrameType] = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in (_OURS, _HOST):
            return package == _OURS
    return False


def internal(error: BaseException) -> InternalError:
    """What to tell about a fault of ours: that it is one, where, and what to do."""
    return InternalError(
        f"moe_plugin itself failed, which is no fault of this launch: {_described(error)} "
        f"({_place(error)}). Please report it with the output of `moe-plugin doctor --json`, this "
        "command and what it prints with --verbose"
    )


def host_rejection(error: BaseException) -> Rejection:
    """The host's refusal in its own words; where it crashed instead, the place too."""
    name = f"SGLang {host_checks.host_version()}"
    if isinstance(error, _DELIBERATE) and str(error):
        return Rejection(
            "host",
            got=_described(error),
            allowed=f"what {name} accepts",
            fix="change what SGLang names: it refuses this launch without moe_plugin too",
        )
    return Rejection(
        "host",
        got=f"a crash of SGLang's own: {_described(error)} ({_place(error)})",
        allowed=f"a launch that {name} can resolve",
        fix="leave out the flag that brings it there: it fails without moe_plugin too",
        kind="unsupported",
    )


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "place unknown"
    last = frames[-1]
    return f"{'/'.join(last.filename.split('/')[-3:])}:{last.lineno}"
