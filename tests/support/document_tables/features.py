"""What was seen of each feature on GPUs, from the records alone: nothing else may claim it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
FEATURES = {
    "speculation": "Multi-token prediction (EAGLE, NextN)",
    "EPLB": "EPLB with redundant experts, rebalanced under load",
    "two-batch overlap": "Two-batch overlap",
    "prefill/decode disaggregation": "Decode instance of a prefill/decode pair",
    "mode auto": "`--deepep-mode auto`, one instance",
    "attention TP": "Attention TP 2; dense TP 1 and the DP LM head",
    "weight updates": "Weight updates from disk and tensors, memory saver",
    "deterministic inference": "Deterministic inference",
    "long contexts": "Long contexts",
    "a public client": "OpenAI SDK: streaming chats with tools, clients that leave",
    "low-latency round trips": "Low-latency round trips, bare",
    "failures": "A rank killed, another T on one rank, no memory for the buffer",
}
"""The name that tests give it -> its title. `tests/gpu/features` has a module for each."""
NOT_SEEN = "not seen yet"


@dataclass(frozen=True, slots=True)
class Row:
    """The newest outcome of one test.

    Attributes:
        record: the file's name without its ending.
        environment: device, date and versions.
        outcome: passed, failed or skipped.
        text: what was seen, or why not.
    """

    record: str
    environment: Mapping[str, str]
    outcome: str
    text: str


def read_rows(folder: Path) -> dict[str, dict[str, Row]]:
    """By feature and test; a later record replaces what an earlier one says of the same test, but
    one that left it out replaces nothing."""
    found: dict[str, dict[str, Row]] = {name: {} for name in FEATURES}
    for path in sorted(folder.glob("*-features*.json")):
        record: dict[str, Any] = json.loads(path.read_text())
        if record["environment"]["device"] == "cpu":
            continue
        for each in record["features"]:
            rows, test = found[each["feature"]], each["test"]
            if each["outcome"] == "skipped" and test in rows:
                continue
            text = each["seen"].get("what", "") if each["outcome"] == "passed" else each["reason"]
            rows[test] = Row(path.stem, record["environment"], each["outcome"], text)
    return found


def is_seen(rows: Mapping[str, Row]) -> bool:
    """Something of it passed and nothing failed."""
    outcomes = {row.outcome for row in rows.values()}
    return "passed" in outcomes and "failed" not in outcomes


def feature_table(folder: Path = RESULTS) -> str:
    """A row for every feature, in the order of the list above."""
    lines = ["| feature | what was seen | where |", "|---|---|---|"]
    for name, rows in read_rows(folder).items():
        lines.append(f"| {FEATURES[name]} | {_seen(rows)} | {_where(rows)} |")
    return "\n".join(lines)


def _seen(rows: Mapping[str, Row]) -> str:
    if not rows:
        return NOT_SEEN
    words = {"passed": "", "failed": "**failed**: ", "skipped": "not run: "}
    said = [words[row.outcome] + row.text.replace("|", "\\|") for row in rows.values()]
    return "<br>".join(dict.fromkeys(said))


def _where(rows: Mapping[str, Row]) -> str:
    places = {}
    for row in rows.values():
        environment = row.environment
        device = environment["device"].removeprefix("NVIDIA ")
        versions = ", ".join(f"{name} {environment[name]}" for name in ("sglang", "sgl-deep-ep"))
        link = f"[record](../benchmarks/results/{row.record}.json)"
        text = f"{environment['devices']} {device}, {environment['date']}, {versions}, {link}"
        places[row.record] = text
    return "<br>".join(places.values())


def feature_summary(folder: Path = RESULTS) -> str:
    """Two sentences for the README."""
    rows = read_rows(folder)
    seen = [name for name in FEATURES if is_seen(rows[name])]
    others = [name for name in FEATURES if name not in seen]
    parts = [f"Seen on two GPUs: {', '.join(seen)}."] if seen else []
    parts += [f"Not seen on GPUs yet, or not all of it: {', '.join(others)}."] if others else []
    return " ".join([*parts, "[What was seen, and where](docs/features.md)."])
