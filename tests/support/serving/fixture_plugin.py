"""A throw-away distribution with entry points, found through PYTHONPATH; nothing is installed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def write_plugin(
    folder: Path, name: str, source: str | Path, entry_points: Mapping[str, str]
) -> dict[str, str]:
    """Write module ``name`` and its metadata below ``folder``.

    Args:
        folder: created.
        name: module, distribution and entry-point name.
        source: of the module, or a file of it.
        entry_points: group -> attribute of the module.

    Returns:
        Environment variables that make it visible to a child process.
    """
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    text = source.read_text() if isinstance(source, Path) else source
    (folder / f"{name}.py").write_text(text)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"[{group}]\n{name} = {name}:{attribute}" for group, attribute in entry_points.items()]
    (info / "entry_points.txt").write_text("\n\n".join(lines) + "\n")
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}
