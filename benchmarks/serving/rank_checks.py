"""Stage `checks`: what several ranks must do with any load, asked of the servers that are up.

The checks are those of `tests/gpu/test_server_gpus.py`, without starts of their own.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from servers import Detached, load_state, save_state

from tests import rank_killed, server_checks

if TYPE_CHECKING:
    from bench import Bench

LENGTHS = (1, 7, 63, 256, 257, 1000, 4000)
NEW_TOKENS = 32


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
    longest = 1000 if bench.cpu else 4000
    lengths = tuple(n for n in LENGTHS if n <= longest)
    ranks, outcomes = options.gpus, bench.report.setdefault("checks", {})
    for record in [s.record for s in load_state(options.work) if s.record.variant[0] in "cde"]:
        server = Running(record)
        checks: dict[str, Callable[[], Any]] = {
            "64 concurrent prompts": lambda s=server: server_checks.check_mixed_prompts(
                s, 64, lengths, NEW_TOKENS
            ),
            "idle ranks": lambda s=server: server_checks.check_idle_ranks(s, NEW_TOKENS),
            "unequal load": lambda s=server: server_checks.check_unequal_load(
                s, ranks, longest, NEW_TOKENS
            ),
            "within the plan": lambda s=server: server_checks.check_within_plan(s, ranks, layers),
        }
        if options.kill:
            checks = {
                "seconds from a rank's kill to the server's end": lambda s=server: round(
                    rank_killed.check_killed_rank_ends_the_server(s, ranks, peers_hang=False), 1
                )
            }
        found = {name: _outcome(check) for name, check in checks.items()}
        outcomes[record.variant] = found
        print(record.variant, json.dumps(found, indent=1), flush=True)
        bench.save()
    if options.kill:
        save_state(options.work, [s for s in load_state(options.work) if s.alive()])


def _outcome(check: Callable[[], Any]) -> Any:
    try:
        found = check()
    except Exception:  # the others are asked all the same
        return traceback.format_exc()[-2000:]
    return "ok" if found is None else found
