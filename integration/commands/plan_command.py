"""``moe-plugin plan``: the budgets of a launch, parsed and resolved by the host's own code."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ...cli.main import REFUSED, USAGE, Parser
from ...errors import ConfigError
from . import target_device as targets
from .plan_launch import plan_launch
from .plan_sweep import sweep

_EPILOG = """\
Every other flag is one of `sglang serve`, parsed by SGLang itself; --model-path is a directory
with config.json at least. Exit code: 0 ok, 2 refused, 1 bad usage.

example:
  moe-plugin plan --model-path ./DeepSeek-V3 --tp-size 8 --attn-dp-size 8 --use-batched-dp-moe on
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = Parser(
        prog="moe-plugin plan",
        description="Show the budgets of a launch. Needs no GPU and no weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    devices = [*sorted(targets.TARGETS), targets.LOCAL]
    parser.add_argument(
        "--target",
        default=targets.DEFAULT_TARGET,
        choices=devices,
        metavar="DEVICE",
        help=f"resolve for this device: {', '.join(devices)} (default: %(default)s; "
        f"{targets.LOCAL} is this machine's)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="moe-plugin-sweep.svg",
        metavar="FILE.svg",
        help="how tokens per rank trade prefill steps against bytes: a table, and a plot in FILE",
    )
    options, rest = parser.parse_known_args(argv)
    with _quiet(options.json) as out:
        try:
            if options.sweep is not None:
                return sweep(rest, options.target, options.sweep, options.json, out)
            answer = plan_launch(rest, options.target)
        except ConfigError as error:
            print(f"moe-plugin plan: error: {error}", file=sys.stderr)
            return USAGE
        except SystemExit as exit_:  # the host's parser; its own 2 would read as "refused"
            return 0 if exit_.code in (0, None) else USAGE
        print(json.dumps(answer, default=str) if options.json else render(answer), file=out)
    return REFUSED if answer["verdict"] == "refused" else 0


def render(answer: dict[str, Any]) -> str:
    """The answer for people."""
    lines = [answer["text"]]
    if answer["resolved"]:
        shown = {k: v for k, v in answer["resolved"].items() if not k.startswith("cuda_graph_bs_")}
        lines.insert(0, "resolved by SGLang: " + ", ".join(f"{k}={v}" for k, v in shown.items()))
    return "\n".join(lines)


@contextlib.contextmanager
def _quiet(json_only: bool) -> Iterator[Any]:
    """Standard output for the answer alone: what else is printed goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    out = os.fdopen(kept, "w", encoding="utf-8")
    try:
        if json_only:
            os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr if json_only else sys.stdout):
            yield out
    finally:
        out.flush()
        sys.stdout.flush()
        os.dup2(kept, 1)
        out.close()
