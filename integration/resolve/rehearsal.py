"""Resolve a refused launch again with its own fixes made, before they are printed.

What they bring to light belongs to the same refusal. The host resolves the whole launch each time,
so that also what it decides late is seen: page sizes, draft widths, another backend's limits.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ...errors import MoePluginError
from ...planning.fixes import followed_by, left_altogether
from ...planning.leaving import LEAVE
from ...planning.plan import Change, Rejection, refusal, words_of
from ..flags import carry_request
from ..host_checks import check_symbol
from ..host_symbols import RECORD_FIELDS
from .exported_variables import changed_environment
from .graph_words import in_typed_words

ROUNDS = 6
_rehearsing = False


@contextlib.contextmanager
def completed_refusals(server_args: Any) -> Iterator[None]:
    """What is refused inside names every fix that it takes, seen to be refused by us no more. What
    the host itself refuses then is its own. Where none is left, the fix is to run without batched
    data-parallel MoE."""
    try:
        yield
    except MoePluginError as error:
        if not error.rejections or check_symbol(RECORD_FIELDS) is not None:
            raise
        found = in_typed_words(server_args, error.rejections)
        if not _rehearsing:
            found = tuple(_left_whole(server_args, e) for e in _completed(server_args, found))
        if found == error.rejections:
            raise
        raise refusal(found, error.plan) from error.__cause__


def _left_whole(server_args: Any, error: Rejection) -> Rejection:
    """``error``, whose way out names a flag that selects DeepEP again, where that was typed."""
    leaves = set(LEAVE) <= set(error.changes)
    if not leaves or not getattr(server_args, "enable_waterfill", False):
        return error
    return replace(error, fix=f"{error.fix}, without --enable-waterfill")


def _completed(server_args: Any, rejections: tuple[Rejection, ...]) -> tuple[Rejection, ...]:
    found = rejections
    for _ in range(ROUNDS):
        if not all(error.changes for error in found):
            return found  # nothing to type helps: more ranks, another device
        more = _still_refused(server_args, [c for error in found for c in error.changes])
        if not more:
            return tuple(_with_what_works(server_args, found, error) for error in found)
        before, found = found, followed_by(found, more)
        if found == before:
            break
    return left_altogether(found)


def _with_what_works(server_args: Any, found: Sequence[Rejection], error: Rejection) -> Rejection:
    """``error`` with the alternatives that are refused no more beside the other reasons' fixes."""
    others = [change for each in found if each is not error for change in each.changes]
    ways = tuple(w for w in error.alternatives if not _still_refused(server_args, [*others, *w]))
    if ways == error.alternatives:
        return error
    fix = ", or ".join(map(words_of, (error.changes, *ways)))
    return replace(error, fix=fix, alternatives=ways)


def _still_refused(server_args: Any, changes: Sequence[Change]) -> tuple[Rejection, ...]:
    """What we refuse of the launch after ``changes``; what the host refuses then is its own."""
    global _rehearsing
    level = logging.root.manager.disable
    _rehearsing = True
    logging.disable(logging.CRITICAL)
    try:
        with changed_environment(changes):
            _changed(server_args, changes).resolve_once()
    except MoePluginError as error:
        return error.rejections
    except (Exception, SystemExit):
        return ()
    finally:
        logging.disable(level)
        _rehearsing = False
    return ()


def _changed(server_args: Any, changes: Sequence[Change]) -> Any:
    """A record of what the user typed, with ``changes`` typed instead."""
    from sglang.srt.arg_groups.arg_utils import record_fields

    kind = type(server_args)
    unset = kind(model_path=server_args.model_path)
    typed = {field.name: getattr(server_args, field.name) for field in record_fields(kind)}
    for flag, value in changes:
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in typed:
            typed[name] = getattr(unset, name) if value is None else _parsed(value, typed[name])
    record = kind(**typed)
    carry_request(server_args, record, dict(changes))
    return record


def _parsed(value: str, before: Any) -> Any:
    if value == "":
        return True  # a switch
    if isinstance(before, list):
        return [_parsed(part, None) for part in value.split()]
    if isinstance(before, dict):
        return json.loads(value)
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value
