"""Run a function on several gloo ranks, each a process of its own."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_TIMEOUT_S = 600


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(group, *args)`` on every rank; the results by rank.

    Args:
        world_size: number of processes.
        function: a module-level function.
        args: picklable.

    Raises:
        AssertionError: a rank failed; the message is its traceback.
    """
    with tempfile.NamedTemporaryFile() as rendezvous:
        context = mp.get_context("spawn")
        queue = context.SimpleQueue()
        workers = [
            context.Process(
                target=_rank, args=(rank, world_size, rendezvous.name, queue, function, args)
            )
            for rank in range(world_size)
        ]
        with _tests_importable():
            for worker in workers:
                worker.start()
        for worker in workers:
            worker.join(_TIMEOUT_S)
        for worker in workers:
            if worker.is_alive():
                worker.kill()
                worker.join()
        results: dict[int, Any] = {}
        while not queue.empty():
            rank, ok, value = queue.get()
            assert ok, f"rank {rank} of {world_size}:\n{value}"
            results[rank] = value
        assert len(results) == world_size, f"only ranks {sorted(results)} answered"
        return [results[rank] for rank in range(world_size)]


@contextlib.contextmanager
def _tests_importable() -> Iterator[None]:
    """Children inherit sys.path. Last, so that our `kernels/` hides no installed package."""
    root = str(Path(__file__).parents[1])
    sys.path.append(root)
    try:
        yield
    finally:
        sys.path.remove(root)


def _rank(
    rank: int, world_size: int, path: str, queue: Any, function: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=rank, world_size=world_size
        )
        queue.put((rank, True, function(dist.group.WORLD, *args)))
        dist.destroy_process_group()
    except Exception:
        # At once as well: its peers may now wait for it until the test runs out of time.
        traceback.print_exc()
        queue.put((rank, False, traceback.format_exc()))
