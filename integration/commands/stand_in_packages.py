"""Empty stand-ins for the compiled packages that import only where a GPU driver is.

The host imports them while it is imported itself, on every CUDA device. A plan for a named device
runs none of their code: it only must not learn from them which machine it runs on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COMPILED = ("sgl_kernel", "deep_gemm", "deep_ep", "flashinfer")
"""SGLang pins them for CUDA, so that a target has them, whether this machine does or not."""
ABSENT = frozenset({"sgl_kernel.scalar_type"})
"""Values that the host compares, and has names of its own for where they do not import."""


class _AnyType(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Anything(metaclass=_AnyType):
    """Whatever a module takes from a package: a base class, a decorator, a function, a value."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(type(self), name)


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class _Finder(MetaPathFinder, Loader):
    """Finds a stand-in for every module of the named packages."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self._names or fullname in ABSENT:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def install() -> None:
    """From now on this process imports the stand-ins. What it imported before stays."""
    sys.meta_path.insert(0, _Finder(frozenset(COMPILED)))
