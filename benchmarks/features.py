"""Join what several test processes wrote of the features: `features.py FILES --out RECORD`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def joined(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One record of runs on one machine with the same packages; a test's last outcome counts, and
    an outcome before a skip.

    Raises:
        ValueError: they are of different machines, days or versions.
    """
    environments = [record["environment"] for record in records]
    if any(environment != environments[0] for environment in environments):
        raise ValueError(f"runs of different environments: {environments}")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        for row in record["features"]:
            key = row["feature"], row["test"]
            if row["outcome"] != "skipped" or key not in rows:
                rows[key] = row
    commands = [command for record in records for command in record["commands"]]
    return {
        "environment": environments[0],
        "commands": list(dict.fromkeys(commands)),
        "features": list(rows.values()),
    }


def main() -> None:
    """Read, join, write; the oldest file first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    files = sorted(options.files, key=lambda path: path.stat().st_mtime)
    record = joined([json.loads(path.read_text()) for path in files])
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in record["features"]:
        print(f"{row['outcome']:<8} {row['feature']}: {row['test']} {row['reason']}")


if __name__ == "__main__":
    main()
