"""Refusals of graph sizes in the words in which the user named them.

The plan speaks of ``--cuda-graph-max-bs-*``. In the host a list, or JSON, wins over it: to type
that flag as well would change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...planning.plan import Change, Rejection, typed, words_of
from .graph_facts import CONFIG, TypedSizes, typed_config, typed_sizes

_FLAGS = {f"--cuda-graph-max-bs-{phase}": phase for phase in ("decode", "prefill")}


def in_typed_words(server_args: Any, rejections: Sequence[Rejection]) -> tuple[Rejection, ...]:
    """``rejections``, with changes of a phase's sizes made wherever the user named some."""
    named = {flag: typed_sizes(server_args, phase) for flag, phase in _FLAGS.items()}
    named = {flag: places for flag, places in named.items() if places and places[0].flag != flag}
    if not named:
        return tuple(rejections)
    words = _Words(named, typed_config(server_args))
    together = {name: value for error in rejections for name, value in error.changes}
    return tuple(words.respelled(error, together) for error in rejections)


@dataclass(frozen=True)
class _Words:
    """What the user named: places by the flag that the plan speaks of, and the JSON."""

    named: Mapping[str, list[TypedSizes]]
    config: Mapping[str, Any]

    def respelled(self, error: Rejection, together: Mapping[str, str | None]) -> Rejection:
        """``together``: changes of all reasons, for one JSON holds both phases."""
        flags = {flag for way in (error.changes, *error.alternatives) for flag, _ in way}
        if not flags & self.named.keys():
            return error
        changes = self._spelled(error.changes, together)
        ways = tuple(self._spelled(way, dict(way)) for way in error.alternatives)
        got = error.got
        for flag in flags & self.named.keys():
            got = got.replace(f"{flag} ", f"{_told(self.named[flag][0], _FLAGS[flag])}: ")
        fix = ", or ".join([_fix(changes), *map(words_of, ways)])
        return replace(error, got=got, fix=fix, changes=changes, alternatives=ways)

    def _spelled(
        self, changes: Iterable[Change], together: Mapping[str, str | None]
    ) -> tuple[Change, ...]:
        sizes = {_FLAGS[flag]: together[flag] for flag in self.named if flag in together}
        spelled: dict[str, str | None] = {}
        for flag, value in changes:
            if flag not in self.named:
                spelled[flag] = value
            for place in self.named.get(flag, ()):
                if place.flag == CONFIG:
                    spelled[CONFIG] = _changed_config(self.config, sizes)
                else:
                    spelled[place.flag] = _changed(place, value)
        return tuple(spelled.items())


def _told(place: TypedSizes, phase: str) -> str:
    if place.flag == CONFIG:
        return f"{CONFIG} {json.dumps({phase: {place.key: place.value}})}"
    return f"{place.flag} {_listed(place.value)}"


def _changed(place: TypedSizes, value: str | None) -> str | None:
    if value is None or place.key == "max_bs":
        return value
    return _listed(_cut(place.value, int(value)))


def _changed_config(config: Mapping[str, Any], sizes: Mapping[str, str | None]) -> str | None:
    """The JSON with other sizes where it names any, and without a phase whose sizes are to go; None
    where nothing is left of it."""
    changed = {phase: dict(named) for phase, named in config.items()}
    for phase, value in sizes.items():
        if value is None:
            changed.pop(phase, None)
            continue
        named = changed.get(phase, {})
        for key in {"bs", "max_bs"} & named.keys():
            named[key] = _cut(named[key], int(value)) if key == "bs" else int(value)
    return json.dumps(changed) if changed else None


def _cut(sizes: Iterable[Any], most: int) -> list[int]:
    """Sizes up to ``most``, and it."""
    return sorted({most, *(int(size) for size in sizes if int(size) < most)})


def _listed(sizes: Iterable[Any]) -> str:
    return " ".join(map(str, sizes))


def _fix(changes: Sequence[Change]) -> str:
    """What to type, and in place of what."""
    there, gone = [], []
    for flag, value in changes:
        if value is None:
            gone.append(flag)
        else:
            there.append(typed(flag, value))
    if not there:
        return words_of(changes)
    text = " ".join(there)
    return f"{text} in place of {', '.join(gone)}" if gone else text
