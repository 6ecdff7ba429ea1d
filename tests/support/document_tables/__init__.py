"""Tables of documents that stand for code or records: `make docs` writes, a test compares them.

A table lies between ``<!-- NAME: make docs -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from .features import feature_summary, feature_table
from .readme import variables, weight_formats

ROOT = Path(__file__).parents[3]
TABLES: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "README.md": {
        "weight formats": weight_formats,
        "features": feature_summary,
        "variables": variables,
    },
    "docs/features.md": {"features": feature_table},
}
"""By document."""


def rewritten(document: str) -> str:
    """A document with each of its tables as it should be."""
    text = (ROOT / document).read_text()
    for name, table in TABLES[document].items():
        head, end = f"<!-- {name}: make docs -->\n", "<!-- end -->"
        new = f"{head}{table()}\n{end}".replace("\\", r"\\")
        text, found = re.subn(f"{re.escape(head)}.*?{end}", new, text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{found} tables called {name!r} in {document}")
    return text
