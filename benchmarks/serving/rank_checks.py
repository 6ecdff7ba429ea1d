"""Stage `checks`: what several ranks must do with any load, asked of the servers that are up.

The checks are those of `tests/gpu/test_server_gpus.py`, without starts of their own.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from common import Bench
from served import LENGTHS
from servers import Detached, load_state, save_state
from variants import OURS

from tests.support import rank_killed, server_checks

NEW_TOKENS = 32

Checks = dict[str, Callable[[], Any]]


class Running(Detached):
    """A detached server as the tests know one: its process, and its log in lines."""

    @property
    def process(self) -> psutil.Process:
        """The launcher."""
        return psutil.Process(self.record.pid)

    @property
    def lines(self) -> list[str]:
        """The whole log."""
        return Path(self.record.log).read_text(errors="replace").splitlines()

    def wait_exit(self, timeout_s: float = 150.0) -> int | None:
        """Wait until it ends by itself; only a parent learns its exit code."""
        code: int | None = self.process.wait(timeout_s)
        return code


def stage_checks(bench: Bench) -> None:
    """Every check of ours; or, with ``--kill``, what becomes of it when a rank is killed."""
    options = bench.options
    layers = json.loads((bench.model() / "config.json").read_text())["num_hidden_layers"]
    outcomes = bench.report.setdefault("checks", {})
    for record in [s.record for s in load_state(options.work) if s.record.variant[0] in OURS]:
        server = Running(record)
        if options.kill:
            checks = _killing(server, options.gpus)
        else:
            checks = _serving(server, options.gpus, layers, 1000 if bench.cpu else 4000)
        found = {name: _outcome(check) for name, check in checks.items()}
        outcomes[record.variant] = found
        print(record.variant, json.dumps(found, indent=1), flush=True)
        bench.save()
    if options.kill:
        save_state(options.work, [s for s in load_state(options.work) if s.alive()])


def _serving(server: Running, ranks: int, layers: int, longest: int) -> Checks:
    lengths = [n for n in LENGTHS if n <= longest]
    ask = server_checks
    return {
        "64 concurrent prompts": partial(ask.check_mixed_prompts, server, 64, lengths, NEW_TOKENS),
        "idle ranks": partial(ask.check_idle_ranks, server, NEW_TOKENS),
        "unequal load": partial(ask.check_unequal_load, server, ranks, longest, NEW_TOKENS),
        "same bits while others prefill": partial(
            ask.check_same_bits, server, ranks, longest, 2 * NEW_TOKENS
        ),
        "within the plan": partial(ask.check_within_plan, server, ranks, layers),
    }


def _killing(server: Running, ranks: int) -> Checks:
    def seconds() -> float:
        ended = rank_killed.check_killed_rank_ends_the_server(server, ranks, peers_hang=False)
        return round(ended, 1)

    return {"seconds from a rank's kill to the server's end": seconds}


def _outcome(check: Callable[[], Any]) -> Any:
    try:
        found = check()
    except Exception as error:  # the others are asked all the same
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"[:2000]
    return "ok" if found is None else found
