"""``moe-plugin doctor --launch FLAGS…``: would this very command be protected?"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...cli.main import USAGE
from .finding import Finding, State
from .target_device import DEFAULT_TARGET, LOCAL

SECONDS = 300


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one launch.

    Attributes:
        protected: it starts, and every batch is bounded to what the all-to-all can move.
        why: what bounds it, or why nothing does.
        target: the device that it was planned for.
        plan: the JSON object of ``moe-plugin plan``; None where the command line is wrong.
    """

    protected: bool
    why: str
    target: str
    plan: dict[str, Any] | None

    def finding(self) -> Finding:
        """The verdict as a line of the report."""
        head = "protected" if self.protected else "NOT protected"
        state: State = "ok" if self.protected else "wrong"
        return Finding("launch", f"on {self.target}", state, f"{head}: {self.why}")


def default_target(argv: Sequence[str]) -> str:
    """This machine's device; a machine that has none plans for a named one."""
    if any(word == "--device" or word.startswith("--device=") for word in argv):
        return LOCAL
    import torch

    return LOCAL if torch.cuda.is_available() else DEFAULT_TARGET


def judge(argv: Sequence[str], target: str) -> Verdict:
    """Plan the launch in a process of its own, as this one has looked at its own device."""
    command = [sys.executable, "-P", "-m", "moe_plugin.cli.main", "plan", "--json"]
    done = subprocess.run(
        [*command, "--target", target, *argv],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    said = done.stderr.strip().partition("error: ")[2] or done.stderr.strip()
    if done.returncode == USAGE:
        return Verdict(False, f"it does not start: {said}", target, None)
    try:
        plan = json.loads(done.stdout)
        return Verdict(*_read(plan), target, plan)
    except (KeyError, ValueError):
        return Verdict(False, said or f"no answer, exit code {done.returncode}", target, None)


def _read(plan: dict[str, Any]) -> tuple[bool, str]:
    capability = plan["capability"]
    if plan["verdict"] == "refused":
        errors = plan["errors"]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        first = errors[0]
        return False, (
            f"refused before weights load: {first['limit']}: got {first['got']}, allowed "
            f"{first['allowed']}. Fix: {first['fix']}{more}"
        )
    if not capability["use_batched_dp_moe"]:
        return False, capability["reason"]
    own = plan["runner"] == "moe_plugin" or plan["own_decode"]
    owner = "moe_plugin" if own else "SGLang"
    return True, (
        f"{' and '.join(capability['modes'])} batches hold at most "
        f"{plan['max_dispatch_tokens_per_rank']} tokens per rank on {capability['backend']}, with "
        f"the experts of {owner}"
    )
