"""Import rules: who may import what, and what `import moe_plugin` must not pull in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "triton", "sglang", "deep_ep")
SHIPPED = ("moe_plugin", "kernels", "integration")


def _module(path: Path) -> str:
    """The dotted name that a file of the checkout is imported under."""
    package = {"kernels": "moe_plugin.kernels", "integration": "moe_plugin.integration"}
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join([package.get(parts[0], parts[0]), *parts[1:]])


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, relative ones spelled out from the package's root."""
    dotted = _module(path).split(".")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = dotted[: len(dotted) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def _files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _offenders(folder: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in _files(folder)
        if str(path.relative_to(ROOT)) not in allowed
        for name in sorted(_imports(path))
        if any(name == root or name.startswith(root + ".") for root in forbidden)
    ]


def test_no_circle() -> None:
    """Neither at the top of a file nor inside a function: a circle is one idea in two files."""
    files = {_module(path): path for folder in SHIPPED for path in _files(folder)}
    graph = {name: _imports(path) & files.keys() - {name} for name, path in files.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_no_basename_twice() -> None:
    """A name says which file is meant, whichever folder it lies in."""
    names = Counter(path.name for folder in SHIPPED for path in _files(folder))
    del names["__init__.py"]
    assert [name for name, count in names.items() if count > 1] == []


def test_kernels_import_nothing_of_ours() -> None:
    """`kernels` is the bottom layer."""
    wrong = [
        f"{path.name} imports {name}"
        for path in _files("kernels")
        for name in _imports(path)
        if name.startswith("moe_plugin") and not name.startswith("moe_plugin.kernels")
    ]
    assert wrong == []


def test_only_integration_imports_sglang() -> None:
    """And nothing below it imports it back; the command line reaches it lazily."""
    assert _offenders("kernels", ("sglang", "deep_ep", "deep_gemm")) == []
    assert _offenders("moe_plugin", ("sglang", "deep_gemm")) == []
    not_cli = [o for o in _offenders("moe_plugin", ("moe_plugin.integration",)) if "/cli/" not in o]
    assert not_cli == []


def test_one_file_imports_deep_ep() -> None:
    """The transport."""
    transport = ("moe_plugin/runtime/transports/deepep_ll.py",)
    assert _offenders("moe_plugin", ("deep_ep",), allowed=transport) == []
    assert _offenders("integration", ("deep_ep",)) == []
    assert "deep_ep" in _imports(ROOT / transport[0])


@pytest.mark.parametrize(
    "module",
    [
        "moe_plugin",
        "moe_plugin.planning.planner",
        "moe_plugin.envs",
        "moe_plugin.runtime.runner",
        "moe_plugin.integration.plugin",
        "moe_plugin.cli.main",
    ],
)
def test_light_imports(module: str) -> None:
    """What every process of the host imports, or a user's shell, costs no torch and no sglang."""
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
