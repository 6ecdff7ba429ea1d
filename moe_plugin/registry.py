"""A name -> value table that refuses duplicates and unknown names, listing what exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from .errors import ConfigError, explain

T = TypeVar("T")


class Registry(Generic[T]):
    """Insertion-ordered registry of ``T`` under unique names.

    Args:
        kind: what the entries are, for messages ("batched-DP MoE backend").
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add ``entry``; the same object twice is harmless, another one under the name raises.

        Raises:
            ConfigError: the name is empty or taken.
        """
        if not name:
            raise ConfigError(f"a {self._kind} needs a non-empty name")
        known = self._entries.get(name)
        if known is not None and known is not entry:
            raise ConfigError(
                explain(
                    f"{self._kind} name",
                    got=f"{name!r}, which is already registered",
                    allowed=f"a name not in {self.names()}",
                    fix="register under another name, or unregister the first one",
                )
            )
        self._entries[name] = entry
        return entry

    def unregister(self, name: str) -> T:
        """Remove and return an entry; unknown names raise :class:`ConfigError`."""
        entry = self.get(name)
        del self._entries[name]
        return entry

    def get(self, name: str) -> T:
        """The entry called ``name``.

        Raises:
            ConfigError: nothing is registered under it; the message lists what is.
        """
        try:
            return self._entries[name]
        except KeyError:
            raise ConfigError(
                explain(
                    f"unknown {self._kind}",
                    got=repr(name),
                    allowed=f"one of {self.names()}",
                    fix="register it first, or use one of these names",
                )
            ) from None

    def names(self) -> list[str]:
        """Registered names, in order of registration."""
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries.values())
