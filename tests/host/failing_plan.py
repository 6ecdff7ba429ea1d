"""A plugin that fails of itself while it plans: run by a test, never by anyone else."""

from __future__ import annotations

import sys

from moe_plugin.cli.main import main
from moe_plugin.planning import row_budgets
from moe_plugin.planning.facts import LaunchFacts


def fail(self: LaunchFacts, *_: object) -> object:
    """Stands in for a method of ours."""
    return row_budgets.ceil_div(1, 0)


if __name__ == "__main__":
    LaunchFacts.capability_facts = fail  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
