"""What documents say of the code: tables, variables, flags, log lines, links and file names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_plugin.integration import flags
from moe_plugin.planning.memory_fit import GRAPH_CAPS

from ..support import document_tables

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *(path for name in ("docs", "benchmarks", "deploy", "examples", ".github") for path in
      sorted((ROOT / name).rglob("*.md"))),
]  # fmt: skip
MOST_LINES = 150
CODE = ("moe_plugin/", "integration/", "kernels/", "tests/", "benchmarks/", "docs/", "deploy/")


@pytest.mark.parametrize("document", document_tables.TABLES)
def test_tables_equal_code_and_records(document: str) -> None:
    """`make docs` writes them."""
    assert document_tables.rewritten(document) == (ROOT / document).read_text()


def test_the_readme_is_short_and_has_both_flags() -> None:
    assert len(README.splitlines()) <= MOST_LINES
    assert f"`{flags.SWITCH_FLAG} {{auto,on,off}}`" in README
    assert f"`{flags.MAX_TOKENS_FLAG} N`" in README


def test_budgets_name_the_sizes_that_are_tried() -> None:
    """Of decode graphs, in order."""
    *sizes, last = map(str, GRAPH_CAPS)
    assert f"{', '.join(sizes)} and {last} requests" in (ROOT / "docs/budgets.md").read_text()


def _log_lines() -> Iterator[str]:
    """Format strings of the plugin's own logger, from its sources."""
    for folder in ("moe_plugin", "integration", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(
                        func=ast.Attribute(
                            value=ast.Name("logger"), attr="info" | "warning" | "error"
                        ),
                        args=[ast.Constant(str() as text), *_],
                    ):
                        yield text


@pytest.mark.parametrize("line", sorted(set(_log_lines())))
def test_an_operator_finds_what_a_log_line_means(line: str) -> None:
    """docs/operations.md has a row for each, with the values left out."""
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    patterns = [re.escape(row).replace("…", ".*") for row in rows]
    shown = re.sub(r"%\.?\d*[sdf]", "…", line).replace("… tokens", "N tokens")
    shown = shown.replace("… expert kernels", "N expert kernels").replace("after … s", "after S s")
    assert any(re.fullmatch(pattern, shown) for pattern in patterns), shown


def _anchor(heading: str) -> str:
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Files and headings of the repository; other hosts are not asked."""
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, heading = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        if heading:
            heads = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in map(_anchor, heads), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    """Modules move; documents that name them have to follow."""
    for name in re.findall(r"`([\w./-]+)`", document.read_text()):
        assert not name.startswith(CODE) or (ROOT / name).exists(), name
