"""Our hooks take what each supported host calls them with, and touch nothing that is not listed."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from moe_plugin import integration
from moe_plugin.integration import plugin
from moe_plugin.integration.scheduler_symbols import DISPATCHERS, SYMBOLS

from ..support.host_sources import definition, parameters
from ..support.versions import OLDER, overlay

HOOKS = (*plugin.FLAG_HOOKS, *plugin.runtime_hooks())
COMMANDS = "commands"
"""Folder of what runs beside a server, never inside one."""


def check_hooks(root: Path) -> None:
    """Every hook can be called as its target is, by position and by name."""
    for hook in HOOKS:
        found = definition(root, hook.symbol.target)
        assert isinstance(found, ast.FunctionDef), hook.symbol.target
        positional, named = parameters(found)
        before = () if hook.kind == "BEFORE" else ("result or original",)
        signature = inspect.signature(hook.function)
        signature.bind(*before, *positional, **dict.fromkeys(named))
        signature.bind(*before, *positional[:1], **dict.fromkeys([*positional[1:], *named]))


def test_hooks_take_what_the_host_passes() -> None:
    """Where one does not, every scheduler dies, also of launches that are not ours."""
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    check_hooks(Path(spec.origin).parents[1])


@pytest.mark.slow
@pytest.mark.parametrize("version", OLDER)
def test_hooks_take_what_older_hosts_pass(version: str) -> None:
    """The same, in the files of hosts that are not installed."""
    check_hooks(overlay(version))


def test_a_hook_is_left_out_with_what_it_needs() -> None:
    """No count stands still, and what bounds a batch needs nothing else."""
    here, gone = HOOKS[0].symbol, replace(HOOKS[0].symbol, path="no.such.symbol", without="less")
    hook = plugin.Hook(here, lambda: None, "AROUND")
    assert hook.missing() is None
    assert "no.such.symbol is missing" in (hook._replace(needs=(gone,)).missing() or "")
    assert "no.such.symbol is missing" in (hook._replace(symbol=gone).missing() or "")
    assert not [hook for hook in HOOKS if hook.needs and not hook.symbol.without]


def imported_symbols(path: Path) -> set[str]:
    """What a file takes from the host, but where it says what happens without."""
    tree = ast.parse(path.read_text())
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Try)
        for each in node.body
        for inner in ast.walk(each)
    }
    return {
        f"{node.module}.{name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node not in guarded
        if (node.module or "").startswith("sglang.")
        for name in node.names
    }


def test_every_symbol_that_we_touch_is_in_the_table() -> None:
    """So that a host that renames one is refused, or does less, and says so."""
    folder = Path(integration.__file__).parent
    files = [path for path in folder.rglob("*.py") if COMMANDS not in path.parts]
    touched = set[str]().union(*map(imported_symbols, files))
    listed = {symbol.target for symbol in (*SYMBOLS, *DISPATCHERS.values())}
    # Of the host's plugin interface itself, without which nothing loads us.
    given = {"sglang.srt.plugins.hook_registry.HookRegistry"}
    given |= {"sglang.srt.plugins.hook_registry.HookType"}
    of_listed_methods = {target.rpartition(".")[0] for target in listed}
    unknown = touched - listed - of_listed_methods - given
    modules = {name for name in unknown if isinstance(pkgutil.resolve_name(name), ModuleType)}
    assert unknown - modules == set()
