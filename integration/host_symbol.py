"""How a symbol of the host that we touch is described."""

from __future__ import annotations

from dataclasses import dataclass

_SRT = "sglang.srt."


@dataclass(frozen=True, slots=True)
class HostSymbol:
    """One symbol of the host that we call or hook.

    Attributes:
        path: dotted path below ``sglang.srt.``.
        parameters: names that must be among its parameters, in this order.
        why: what we need it for.
        delete_when: what upstream change makes the entry unnecessary.
        runtime: only needed in scheduler processes (importing it is expensive elsewhere).
        without: what the plugin does where this is missing; empty where it cannot act at all. What
            bounds a batch never depends on a symbol that may be missing.
    """

    path: str
    parameters: tuple[str, ...]
    why: str
    delete_when: str
    runtime: bool = False
    without: str = ""

    @property
    def target(self) -> str:
        """Full dotted path, as ``HookRegistry`` takes it."""
        return _SRT + self.path
