"""``moe-plugin plan``: the budgets of a launch, parsed and resolved by the host's own code."""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import traceback
from collections.abc import Sequence
from typing import Any

from ...cli.main import INTERNAL, REFUSED, USAGE, Parser
from ...cli.tables import table_for
from ...errors import ConfigError, UnsupportedError
from ...planning.report import table
from . import target_device as targets
from .blame import InternalError
from .host_output import Streams, quiet_host
from .plan_explain import explained
from .plan_explain import render as render_budget
from .plan_launch import plan_launch, why_absent
from .plan_sweep import sweep

_EPILOG = """\
Every other flag is one of `sglang serve`, parsed by SGLang itself; --model-path is a directory
with config.json at least. Exit code: 0 ok, 2 refused, 1 bad usage, 3 a fault of moe_plugin's own.

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
        const="",
        metavar="FILE",
        help="how tokens per rank trade prefill steps against bytes: a table, and with FILE a plot",
    )
    parser.add_argument(
        "--explain",
        metavar="BUDGET",
        help="why one number is what it is, by its name, or its flag without the dashes",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="what SGLang logs meanwhile, on standard error"
    )
    options, rest = parser.parse_known_args(argv)
    # A short process: to search all that the host imports for garbage takes seconds, also at exit.
    gc.disable()
    atexit.register(gc.freeze)
    with quiet_host(options.verbose) as streams:
        try:
            if options.sweep is not None:
                return sweep(rest, options.target, options.sweep, options.json, streams.out)
            draw = table if options.json else table_for(streams.out)
            answer = plan_launch(rest, options.target, draw)
            budget = explained(answer, options.explain) if options.explain else None
        except InternalError as error:
            return _failed(error, options.json, streams)
        except (ConfigError, UnsupportedError) as error:
            print(f"moe-plugin plan: error: {error}", file=streams.err)
            return USAGE
        except SystemExit as exit_:  # the host's parser; its own 2 would read as "refused"
            if exit_.code in (0, None):
                return 0
            absent = why_absent()
            because = f" ({absent})" if absent else ""
            print(f"moe-plugin plan: error: {streams.why(exit_)}{because}", file=streams.err)
            return USAGE
        if options.json:
            text = json.dumps({"explain": budget} if budget else answer, default=str)
        else:
            text = render_budget(budget) if budget else render(answer)
        print(text, file=streams.out)
    return REFUSED if answer["verdict"] == "refused" else 0


def _failed(error: InternalError, as_json: bool, streams: Streams) -> int:
    """Report a fault of our own: neither a refusal nor bad usage."""
    if as_json:
        print(json.dumps({"verdict": "internal error", "error": str(error)}), file=streams.out)
    print(f"moe-plugin plan: internal error: {error}", file=streams.err)
    traceback.print_exception(error)  # where the host's log goes
    return INTERNAL


def render(answer: dict[str, Any]) -> str:
    """The answer for people."""
    lines = [answer["text"]]
    if answer["resolved"]:
        shown = {k: v for k, v in answer["resolved"].items() if not k.startswith("cuda_graph_bs_")}
        lines.insert(0, "resolved by SGLang: " + ", ".join(f"{k}={v}" for k, v in shown.items()))
    return "\n".join(lines)
