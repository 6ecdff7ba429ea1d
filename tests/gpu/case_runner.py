"""Run all cases on all ranks in one go, and tell of each what became of it.

Ranks write their results to files as they go, so that a case that hangs or takes its process
down loses no result before it, and is named.
"""

from __future__ import annotations

import faulthandler
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..support.ranks import run_ranks
from .cases import CASES
from .world import World

CREATE, DESTROY, END = "create", "destroy", "processes end"
NAMES = (CREATE, *CASES, DESTROY, END)
"""Every reported name, in order."""


def run_cases(
    ranks: int, make_world: Callable[..., World], *args: Any, limit_s: float, timeout_s: float
) -> dict[str, str]:
    """Every name to what went wrong, "" if nothing did.

    Args:
        ranks: number of processes.
        make_world: ``make_world(group, *args)`` on each rank; a module-level function.
        limit_s: of one case; a rank that takes longer prints where it is and ends.
        timeout_s: of everything.
    """
    with tempfile.TemporaryDirectory() as folder:
        end = ""
        try:
            run_ranks(ranks, _on_rank, folder, limit_s, make_world, args, timeout_s=timeout_s)
        except AssertionError as error:
            end = str(error)
        records = [_read(Path(folder) / f"{rank}.jsonl") for rank in range(ranks)]
    return {name: _outcome(records, name) for name in NAMES[:-1]} | {END: end}


def _read(path: Path) -> dict[str, str | None]:
    """Case to error text; None for one that was begun and not finished."""
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(map(json.loads, lines))


def _outcome(records: list[dict[str, str | None]], name: str) -> str:
    problems = []
    for rank, record in enumerate(records):
        if name not in record:
            problems.append(f"rank {rank}: not run")
        elif record[name] is None:
            problems.append(f"rank {rank}: did not finish; its traceback is in the output")
        elif record[name]:
            problems.append(f"rank {rank}: {record[name]}")
    return "\n".join(problems)


class _Broken(RuntimeError):
    """A case failed in a way after which the ranks may be out of step."""


class _Log:
    """Runs cases on this rank and writes down what happens."""

    def __init__(self, group: dist.ProcessGroup, path: Path, limit_s: float) -> None:
        self._group, self._path, self._limit_s = group, path, limit_s

    def _write(self, name: str, error: str | None) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps([name, error]) + "\n")

    def run(self, name: str, case: Callable[[], Any]) -> Any:
        """The case's result.

        Raises:
            _Broken: an exception other than a failed assertion, on any rank.
        """
        rank = self._group.rank()
        self._write(name, None)
        print(f"rank {rank}: {name} ...", flush=True)
        faulthandler.dump_traceback_later(self._limit_s, exit=True)
        began, error, broken, result = time.monotonic(), "", False, None
        try:
            result = case()
        except AssertionError:
            error = traceback.format_exc()
        except Exception:
            error, broken = traceback.format_exc(), True
        print(f"rank {rank}: {name}: {time.monotonic() - began:.2f} s {error or 'ok'}", flush=True)
        self._write(name, error)
        everyone: list[Any] = [None] * self._group.size()
        dist.all_gather_object(everyone, broken, self._group)
        faulthandler.cancel_dump_traceback_later()
        if any(everyone):
            raise _Broken(f"{name} failed on rank(s) {[r for r, b in enumerate(everyone) if b]}")
        return result


def _on_rank(
    group: dist.ProcessGroup,
    folder: str,
    limit_s: float,
    make_world: Callable[..., World],
    args: tuple,
) -> None:
    log = _Log(group, Path(folder) / f"{group.rank()}.jsonl", limit_s)
    world = log.run(CREATE, lambda: make_world(group, *args))
    for name, case in CASES.items():
        log.run(name, lambda case=case: case(world))
    log.run(DESTROY, world.destroy)
