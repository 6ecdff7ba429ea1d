"""Refusals of graph sizes in the words in which the user named them.

The plan speaks of ``--cuda-graph-max-bs-*``. In the host a list, or JSON, wins over it: to type
that flag as well would change nothing.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...planning.plan import Change, Rejection
from .graph_facts import CONFIG, TypedSizes, typed_config, typed_sizes

_FLAGS = {f"--cuda-graph-max-bs-{phase}": phase for phase in ("decode", "prefill")}


def in_typed_words(server_args: Any, rejections: Sequence[Rejection]) -> tuple[Rejection, ...]:
    """``rejections``, with changes of a phase's sizes made wherever the user named some."""
    typed = {flag: typed_sizes(server_args, phase) for flag, phase in _FLAGS.items()}
    typed = {flag: places for flag, places in typed.items() if places and places[0].flag != flag}
    wanted = {name: value for error in rejections for name, value in error.changes}
    if not typed.keys() & wanted.keys():
        return tuple(rejections)
    sizes = {_FLAGS[flag]: value for flag, value in wanted.items() if flag in typed}
    config = _changed_config(typed_config(server_args), sizes)
    return tuple(_respelled(error, typed, config) for error in rejections)


def _respelled(
    error: Rejection, typed: Mapping[str, list[TypedSizes]], config: str | None
) -> Rejection:
    got, changes = error.got, dict[str, str | None]()
    for flag, value in error.changes:
        if flag not in typed:
            changes[flag] = value
            continue
        for place in typed[flag]:
            changes[place.flag] = config if place.flag == CONFIG else _changed(place, value)
        got = got.replace(f"{flag} ", f"{_told(typed[flag][0], _FLAGS[flag])}: ")
    if not any(flag in typed for flag, _ in error.changes):
        return error
    return replace(error, got=got, fix=_fix(changes.items()), changes=tuple(changes.items()))


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


def _fix(changes: Iterable[Change]) -> str:
    """What to type, and in place of what."""
    typed, gone = [], []
    for flag, value in changes:
        if value is None:
            gone.append(flag)
        else:
            typed.append(f"{flag} {shlex.quote(value) if flag == CONFIG else value}".strip())
    text = " ".join(typed)
    return f"{text} in place of {', '.join(gone)}" if gone else text
