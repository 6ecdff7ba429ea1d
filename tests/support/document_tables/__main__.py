"""`make docs`."""

from . import ROOT, TABLES, rewritten

for path in TABLES:
    (ROOT / path).write_text(rewritten(path))
