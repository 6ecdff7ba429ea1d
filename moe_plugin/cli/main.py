"""``moe-plugin``: plan a launch, look at an installation, tune kernels.

Commands load what they need when they run, so that ``moe-plugin --help`` needs neither torch nor
sglang. Exit codes: 0 good, 2 refused (or not active), 1 bad usage, 3 a fault of our own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

Command = Callable[[Sequence[str]], int]

USAGE = 1
REFUSED = 2
INTERNAL = 3
_COMMANDS = {
    "plan": (
        "moe_plugin.integration.commands.plan_command",
        "budgets of a launch, for a named device: no GPU and no weights needed",
    ),
    "doctor": (
        "moe_plugin.integration.commands.doctor",
        "host, device and libraries: what is active, and why not",
    ),
    "tune": (
        "moe_plugin.cli.tune_command",
        "measure kernel launches on this GPU and store the best",
    ),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors exit with 1: 2 means refused."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    listed = "\n".join(f"  {name:8}{text}" for name, (_, text) in _COMMANDS.items())
    parser = Parser(
        prog="moe-plugin",
        description="Batched data-parallel MoE for SGLang.",
        epilog=f"commands:\n{listed}\n\nmoe-plugin COMMAND --help says more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=sorted(_COMMANDS), metavar="COMMAND")
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Everything behind the command belongs to it, `--help` and unknown flags included.
    parsed = parser.parse_args(arguments[:1])
    command: Command = import_module(_COMMANDS[parsed.command][0]).main
    return int(command(arguments[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main())
