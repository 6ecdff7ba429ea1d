"""Whether LoRA adapters touch the routed experts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_EXPERTS = frozenset({"gate_up_proj", "down_proj"})
"""Normalised modules that adapters must have, both, for the host to wrap the experts
(``LoRAManager.init_lora_modules``)."""


def adapts_experts(cfg: Any) -> bool:
    """Whether the host will wrap the experts, as far as flags and adapters on this disk tell.

    Adapters that are not here are read when the server starts; the host's own error is in time
    for them.
    """
    if not (cfg.enable_lora or (cfg.enable_lora is None and cfg.lora_paths)):
        return False
    modules = set(cfg.lora_target_modules or ())
    if not modules:
        modules = {name for path in _paths(cfg.lora_paths) for name in _modules(path)}
    return bool(modules & {"all", "all-linear"}) or _normalised(modules) >= _EXPERTS


def _normalised(modules: Iterable[str]) -> set[str]:
    from sglang.srt.lora.utils import get_normalized_target_modules

    return set(get_normalized_target_modules(list(modules)))


def _paths(adapters: Any) -> list[str]:
    """Paths of ``--lora-paths``: ``path``, ``name=path``, mappings, or the host's references."""
    if isinstance(adapters, dict):
        return [str(path) for path in adapters.values()]
    paths = []
    for adapter in adapters or ():
        if isinstance(adapter, dict):
            paths.append(str(adapter.get("lora_path", "")))
        elif isinstance(adapter, str):
            paths.append(adapter.partition("=")[2] or adapter)
        else:
            paths.append(str(adapter.lora_path))
    return paths


def _modules(path: str) -> list[str]:
    try:
        found = json.loads(Path(path, "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    modules = found.get("target_modules") or []
    return [modules] if isinstance(modules, str) else [str(name) for name in modules]
