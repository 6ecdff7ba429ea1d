"""`sglang.bench_serving`, where the package `datasets` may be absent.

The host's client imports it for data sets that are downloaded; random ids need none of it.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import NoReturn

NAME = "datasets"


def _load_dataset(*_args: object, **_options: object) -> NoReturn:
    raise ModuleNotFoundError(f"the package `{NAME}` is not installed")


def import_without_datasets() -> None:
    """Import the one module that needs the name, and take the name away again.

    Others ask whether the package is there, and must hear that it is not.
    """
    absent = ModuleType(NAME)
    absent.__spec__ = ModuleSpec(NAME, None)
    absent.load_dataset = _load_dataset  # type: ignore[attr-defined]
    sys.modules[NAME] = absent
    try:
        import_module("sglang.benchmark.datasets.mmmu")
    finally:
        del sys.modules[NAME]


if __name__ == "__main__":
    if find_spec(NAME) is None:
        import_without_datasets()
    runpy.run_module("sglang.bench_serving", run_name="__main__", alter_sys=True)
