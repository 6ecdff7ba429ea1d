"""`run_ranks` returns in time whatever a rank does: the other rank tests stand on it."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist

from ..support import ranks
from ..support.ranks import run_ranks


def _large_answer(group) -> bytes:
    return bytes([group.rank()]) * (1 << 20)


def _fail_alone(group, how: str) -> None:
    if group.rank() == 0:
        if how == "raises":
            raise ValueError("rank 0 gives up")
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raises":
        time.sleep(600)
    dist.barrier(group)


def _bad_end(group) -> str:
    import atexit

    atexit.register(os._exit, 3)
    return "answered"


def test_answers_of_any_size() -> None:
    """More than a pipe holds, from every rank."""
    assert run_ranks(2, _large_answer) == [b"\0" * (1 << 20), b"\1" * (1 << 20)]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "rank 0 gives up"),
        ("dies", r"rank 0 of 2: ended without an answer, exit code -9"),
    ],
)
def test_a_failing_rank_takes_its_peers_with_it(
    how: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer would wait for ten minutes; the failure is told after the grace time."""
    monkeypatch.setattr(ranks, "GRACE_S", 1.0)
    began = time.monotonic()
    with pytest.raises(AssertionError, match=says):
        run_ranks(2, _fail_alone, how)
    assert time.monotonic() - began < 300


def test_a_process_that_ends_badly_after_its_answer_is_a_failure() -> None:
    """A buffer that cannot be destroyed cleanly shows here."""
    with pytest.raises(AssertionError, match="ended after its answer, exit code 3"):
        run_ranks(1, _bad_end)


def _late(group) -> None:
    time.sleep(600)


def test_time_limit() -> None:
    """No answer at all."""
    with pytest.raises(AssertionError, match="no answer in time"):
        run_ranks(1, _late, timeout_s=1.0)
