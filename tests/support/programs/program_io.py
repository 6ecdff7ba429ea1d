"""How a program of the tests is given JSON values, and answers with one.

The folder of the programs is on their path: `from program_io import emit, given`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MARK = "RESULT:"


def given() -> Any:
    """What the test passed: one value, or several as a list."""
    values = [json.loads(text) for text in sys.argv[1:]]
    return values[0] if len(values) == 1 else values


def emit(value: Any) -> None:
    """Answer; the last answer counts."""
    print(MARK + json.dumps(value))
