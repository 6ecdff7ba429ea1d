"""Whether this host is one that we can work with: its version, and the symbols that we touch."""

from __future__ import annotations

import inspect
import pkgutil
from importlib.metadata import version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from .host_symbol import HostSymbol
from .host_symbols import SYMBOLS

SUPPORTED_HOST = SpecifierSet(">=0.5.20,<0.6", prereleases=True)
TESTED_HOSTS = ("0.5.20", "0.5.21", "0.5.22", "0.5.23")
"""Hosts that the tests run on, ascending. Newer ones have to pass the checks of this table."""


def host_version() -> str:
    """Version of the installed SGLang distribution."""
    return version("sglang")


def check_version() -> str | None:
    """Why this host version is not supported, or None."""
    found = host_version()
    if found in SUPPORTED_HOST:
        return None
    return f"sglang {found} is outside the supported range {SUPPORTED_HOST}"


def newer_than_tested() -> str | None:
    """A note where this host is newer than every one that was tested, or None."""
    found = host_version()
    if Version(found) <= Version(TESTED_HOSTS[-1]):
        return None
    return f"sglang {found} is newer than {TESTED_HOSTS[-1]}, the newest that was tested"


def check_symbol(symbol: HostSymbol) -> str | None:
    """Why ``symbol`` cannot be used on this host, or None. Imports its module."""
    try:
        found = pkgutil.resolve_name(symbol.target)
    except (ImportError, AttributeError) as error:
        return f"{symbol.target} is missing ({error}); needed to {symbol.why}"
    # Another plugin may have wrapped it: what counts is the host's own signature underneath.
    names = list(inspect.signature(inspect.unwrap(found)).parameters)
    positions = [names.index(name) if name in names else -1 for name in symbol.parameters]
    if -1 in positions or positions != sorted(positions):
        return (
            f"{symbol.target} takes {names}, expected {list(symbol.parameters)} in this order; "
            f"needed to {symbol.why}"
        )
    return None


def problems(*, runtime: bool) -> list[str]:
    """Everything about this host that we cannot work with; empty when all is well.

    Args:
        runtime: also check what scheduler processes need (imports model code).
    """
    wrong_version = check_version()
    if wrong_version:
        return [wrong_version]
    needed = [symbol for symbol in SYMBOLS if not symbol.without]
    wanted = [symbol for symbol in needed if runtime or not symbol.runtime]
    return [text for symbol in wanted if (text := check_symbol(symbol))]
