"""Run a function on several ranks, each a process of its own with a gloo group."""

from __future__ import annotations

import contextlib
import gc
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GRACE_S = 10.0
"""How long the other ranks may go on once one has failed: they may wait for it for ever."""

END_S = 60.0
"""How long a rank may take from its answer to the end of its process."""


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 500.0
) -> list[Any]:
    """``function(group, *args)`` on every rank; the results by rank.

    Returns or raises within ``timeout_s`` (and the little that ending processes takes), however
    the ranks fail: by an exception, by a crash, or by waiting for a peer that is gone.

    Args:
        world_size: number of processes.
        function: a module-level function.
        args: picklable.
        timeout_s: for all of it; keep it below the test's own time limit.

    Raises:
        AssertionError: a rank failed, hung or did not end cleanly; the message has every traceback.
    """
    with tempfile.TemporaryDirectory() as folder:  # gloo removes the file that it meets at
        context = mp.get_context("spawn")
        ranks = []
        try:
            with _tests_importable():
                for rank in range(world_size):
                    # A pipe each: a queue's lock would stay locked by a rank that is killed.
                    ours, theirs = context.Pipe(duplex=False)
                    job = (rank, world_size, f"{folder}/meet", theirs, function, args)
                    worker = context.Process(target=_rank, args=job, daemon=True)
                    worker.start()
                    theirs.close()
                    ranks.append(_Rank(rank, worker, ours))
            _collect(ranks, time.monotonic() + timeout_s)
        finally:
            for each in ranks:
                each.end()
    problems = [
        f"rank {each.rank} of {world_size}: {each.problem}" for each in ranks if each.problem
    ]
    assert not problems, "\n".join(problems)
    return [each.value for each in ranks]


class _Rank:
    """One process and what became of it."""

    def __init__(self, rank: int, worker: Any, pipe: Connection) -> None:
        self.rank, self.worker, self.pipe = rank, worker, pipe
        self.value: Any = None
        self.problem = ""
        self.talks = True
        self.answered = self.ended = False

    def sources(self) -> list[Any]:
        """What to wait for: the answer first, then the end of the process."""
        if self.ended:
            return []
        return [self.pipe, self.worker.sentinel] if self.talks else [self.worker.sentinel]

    def look(self) -> None:
        """Take note of an answer or of the process's end, whichever is there."""
        if self.talks and self.pipe.poll():
            self.talks = False
            with contextlib.suppress(EOFError):  # it ended without an answer
                ok, value = self.pipe.recv()
                self.answered = True
                if ok:
                    self.value = value
                else:
                    self.problem = f"\n{value}"
        if not self.worker.is_alive() and not (self.talks and self.pipe.poll()):
            self.talks = False  # whoever else still holds its end of the pipe
            self._note_end()

    def _note_end(self) -> None:
        self.ended = True
        if not self.problem and (self.worker.exitcode or not self.answered):
            when = "after its answer" if self.answered else "without an answer"
            self.problem = f"ended {when}, exit code {self.worker.exitcode}"

    def end(self) -> None:
        """Leave no process behind."""
        if self.worker.is_alive():
            self.worker.kill()
        self.worker.join()
        self.pipe.close()


def _collect(ranks: list[_Rank], deadline: float) -> None:
    """Wait for answers and ends; not long any more once a rank has failed or all have answered."""
    failed = answered = False
    while sources := [source for each in ranks for source in each.sources()]:
        left = deadline - time.monotonic()
        if left <= 0 or not wait(sources, left):
            for each in ranks:
                if not each.ended and not each.problem:
                    each.problem = (
                        "did not end after its answer"
                        if each.answered
                        else "no answer" + (" once a peer had failed" if failed else " in time")
                    )
            return
        for each in ranks:
            each.look()
        if not failed and any(each.problem for each in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
        if not answered and all(each.answered for each in ranks):
            answered, deadline = True, min(deadline, time.monotonic() + END_S)


@contextlib.contextmanager
def _tests_importable() -> Iterator[None]:
    """Children inherit sys.path. Last, so that our `kernels/` hides no installed package."""
    root = str(Path(__file__).parents[2])
    sys.path.append(root)
    try:
        yield
    finally:
        sys.path.remove(root)


def _rank(
    rank: int,
    world_size: int,
    path: str,
    pipe: Connection,
    function: Callable[..., Any],
    args: Any,
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=world_size
        )
        pipe.send((True, function(dist.group.WORLD, *args)))
        with contextlib.suppress(RuntimeError):  # a peer that is gone is told for itself
            dist.barrier()  # a peer may still be connecting
        gc.collect()  # gloo's threads abort a process that ends with a group in a cycle
        dist.destroy_process_group()
    except BaseException:  # pytest's own failures are no Exception
        # At once as well: the peers' own output may say more, and comes in between.
        traceback.print_exc()
        with contextlib.suppress(OSError):  # the answer is out already; the exit code tells
            pipe.send((False, traceback.format_exc()))
        sys.exit(1)
