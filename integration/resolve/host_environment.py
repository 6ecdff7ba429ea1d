"""Variables of the host's, read as the host reads them."""

from __future__ import annotations

import os


def environment_int(name: str | None) -> int | None:
    """An integer variable; None when unset or when the host would ignore it as no integer."""
    text = os.environ.get(name or "", "").strip()
    try:
        return int(text) if text else None
    except ValueError:
        return None


def environment_bool(name: str) -> bool | None:
    """A switch as the host reads it; None when unset or unreadable."""
    text = os.environ.get(name, "").strip().lower()
    if text in ("1", "true", "yes", "y"):
        return True
    return False if text in ("0", "false", "no", "n") else None
