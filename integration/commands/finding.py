"""One line of what ``moe-plugin doctor`` reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "info", "wrong"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        area: what was looked at.
        name: which part of it.
        state: ``wrong`` alone decides the exit code.
        text: what was found.
    """

    area: str
    name: str
    state: State
    text: str
