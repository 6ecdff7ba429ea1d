"""Runners that this host has functions for DeepEP's low-latency rows for.

Read from its source: the modules that register them import kernels that need a GPU, and importing
them for a plan would fill the host's registries for the machine it runs on. Functions that other
plugins registered in this process are found in the registries themselves.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_LAYERS = "sglang.srt.layers.moe."
_REGISTERS = re.compile(r'register_(pre_permute|fused_func)\(\s*"(\w+)",\s*"(\w+)"')
_LOW_LATENCY = {("pre_permute", "deepep_ll"), ("fused_func", "deepep")}


@cache
def batched_runners() -> frozenset[str]:
    """Names as ``--moe-runner-backend`` spells them; runners of other devices are among them."""
    host = find_spec("sglang")
    assert host is not None
    assert host.submodule_search_locations
    folder = Path(host.submodule_search_locations[0], "srt", "layers", "moe")
    return frozenset(
        runner
        for path in folder.rglob("*.py")
        for kind, output, runner in _REGISTERS.findall(path.read_text(encoding="utf-8"))
        if (kind, output) in _LOW_LATENCY
    )


def is_foreign(runner: str) -> bool:
    """Whether another plugin brought this runner, or functions of its own for it."""
    names = _registered("utils", "_REGISTERED_MOE_RUNNER_BACKEND_NAMES")
    cores = _registered("moe_runner.runner", "_CUSTOM_RUNNER_CORE_FACTORIES")
    if runner in names or runner in cores:
        return True
    if runner in batched_runners():
        return False
    base = sys.modules.get(f"{_LAYERS}moe_runner.base")
    permutes = getattr(getattr(base, "PermuteMethodPool", None), "_pre_permute_methods", ())
    fused = getattr(getattr(base, "FusedOpPool", None), "_fused_funcs", ())
    return ("deepep_ll", runner) in permutes or ("deepep", runner) in fused


def _registered(module: str, name: str) -> frozenset[str]:
    # Whoever registered something has imported it.
    return frozenset(getattr(sys.modules.get(_LAYERS + module), name, ()))
