"""What became of the plugin in this process: every part of the integration may ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(slots=True)
class Status:
    """What became of the plugin in this process.

    Attributes:
        state: ``not loaded``, ``active``, ``disabled`` (kill switch) or ``unsupported``.
        reasons: why it is not active.
        hooked: host symbols that we hooked here.
    """

    state: Literal["not loaded", "active", "disabled", "unsupported"] = "not loaded"
    reasons: list[str] = field(default_factory=list)
    hooked: list[str] = field(default_factory=list)


STATUS = Status()
