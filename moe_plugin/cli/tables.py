"""Tables for people: drawn by rich on a terminal, plain text everywhere else."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import IO

from ..planning.report import table

Rows = Sequence[Sequence[str]]
"""The head, then the rows."""


def table_for(out: IO[str]) -> Callable[[Rows], str]:
    """How to draw a table that ``out`` will show."""
    # rich comes with what SGLang depends on, not with SGLang itself.
    return drawn if out.isatty() and find_spec("rich") is not None else table


def drawn(rows: Rows) -> str:
    """The table for a terminal, as wide as that is; cells wrap."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # The largest width of a cell decides who wraps: text does, names and numbers do not.
    long = [max(len(row[column]) for row in rows) > 30 for column in range(len(rows[0]))]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, wraps in zip(rows[0], long, strict=True):
        grid.add_column(Text(name), no_wrap=not wraps, overflow="fold")
    for row in rows[1:]:
        grid.add_row(*map(Text, row))
    text = io.StringIO()
    width = shutil.get_terminal_size().columns
    Console(file=text, force_terminal=True, width=width).print(grid)
    return "\n".join(line for line in text.getvalue().splitlines() if line.strip())
