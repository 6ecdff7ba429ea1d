"""What a local checkpoint's safetensors files say about their tensors, from headers alone."""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16")
MOST_HEADER_BYTES = 100 << 20
"""The format's own bound of a header."""


class Checkpoint(NamedTuple):
    """Tensors with their bytes where the files are here, and the index's total where it is."""

    tensors: tuple[tuple[str, int], ...]
    total: int


def read_checkpoint(path: str, dtype_bytes: int) -> Checkpoint:
    """Tensors and bytes below a local directory; both empty for anything else.

    Args:
        path: ``--model-path``. A name on a hub is not looked up: each node would find its own.
        dtype_bytes: of the activation dtype, in which the host keeps floating-point weights
            however they are stored; scales stay as they are.
    """
    folder = Path(path)
    if not folder.is_dir():
        return Checkpoint((), 0)
    stamp = max((file.stat().st_mtime_ns for file in folder.glob("*.safetensors*")), default=0)
    return _read(str(folder), dtype_bytes, stamp)


@lru_cache(maxsize=4)
def _read(path: str, dtype_bytes: int, _stamp: int) -> Checkpoint:
    folder = Path(path)
    names, total = _index(folder / INDEX)
    files = [folder / name for name in names] or sorted(folder.glob("*.safetensors"))
    if not files or not all(file.is_file() for file in files):
        return Checkpoint((), total)
    try:
        tensors = tuple(tensor for file in files for tensor in _header(file, dtype_bytes))
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return Checkpoint((), total)  # an unfinished download: the loader will say so
    return Checkpoint(tensors, total)


def _index(path: Path) -> tuple[list[str], int]:
    """(file names, bytes in all) of an index; empty without one that can be read."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(set(index.get("weight_map", {}).values()))
        return names, int(index.get("metadata", {}).get("total_size", 0))
    except (OSError, ValueError, TypeError, AttributeError):
        return [], 0


def _header(path: Path, dtype_bytes: int) -> list[tuple[str, int]]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MOST_HEADER_BYTES:
            raise ValueError(path)
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return [(name, _loaded_bytes(name, tensor, dtype_bytes)) for name, tensor in header.items()]


def _loaded_bytes(name: str, tensor: dict[str, Any], dtype_bytes: int) -> int:
    if tensor["dtype"] in _FLOATS and name.endswith(("weight", "proj")) and "scale" not in name:
        return int(prod(tensor["shape"])) * dtype_bytes
    begin, end = tensor["data_offsets"]
    return int(end) - int(begin)
