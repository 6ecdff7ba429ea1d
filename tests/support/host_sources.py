"""Functions of a host as they stand in its files: nothing of it is imported."""

from __future__ import annotations

import ast
from pathlib import Path


def definition(root: Path, target: str) -> ast.FunctionDef | ast.ClassDef | None:
    """What ``target`` names: a function, method or class; None where it is not defined there.

    Args:
        root: the directory that holds ``sglang``.
        target: dotted path, as in ``sglang.srt.managers.scheduler.Scheduler.__init__``.
    """
    parts = target.split(".")
    for depth in range(len(parts), 0, -1):
        module = root.joinpath(*parts[:depth]).with_suffix(".py")
        if module.is_file():
            return _inside(ast.parse(module.read_text()), parts[depth:])
    return None


def _inside(tree: ast.AST, names: list[str]) -> ast.FunctionDef | ast.ClassDef | None:
    found: ast.AST | None = tree
    for name in names:
        body = getattr(found, "body", ())
        found = next((each for each in body if getattr(each, "name", None) == name), None)
    return found if isinstance(found, ast.FunctionDef | ast.ClassDef) else None


def parameters(function: ast.FunctionDef) -> tuple[list[str], list[str]]:
    """Names that may be given by position, and those that may not."""
    given = function.args
    positional = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    return positional, [argument.arg for argument in given.kwonlyargs]
