"""A command line and its variables after the changes that a refusal names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def after(case: dict[str, Any], changes: Iterable[tuple[str, str | None]]) -> dict[str, Any]:
    """``case`` of the resolving worker, with every change made: a flag's values go with it."""
    argv, env = list(case["argv"]), dict(case.get("env", {}))
    for name, value in changes:
        if re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            env.pop(name, None)
            env |= {} if value is None else {name: value}
            continue
        argv = _without(argv, name)
        if value is not None:
            argv += [name, value]
    return {**case, "argv": argv, "env": env}


def _without(argv: list[str], flag: str) -> list[str]:
    kept, skipping = [], False
    for item in argv:
        if item.startswith("--"):
            skipping = item == flag
        if not skipping:
            kept.append(item)
    return kept
