"""``moe-plugin plan --sweep``: the same launch, resolved by the host once per T."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...cli.main import REFUSED
from ...planning.report import table
from ...planning.sweep import TOKENS, Point, prefill_steps, rows, svg
from ..flags import MAX_TOKENS_FLAG
from .plan_launch import plan_launch


def without_tokens(argv: Sequence[str]) -> list[str]:
    """The command line without our own T, which the sweep sets."""
    kept: list[str] = []
    skip = False
    for argument in argv:
        if skip or argument == MAX_TOKENS_FLAG:
            skip = not skip
        elif not argument.startswith(MAX_TOKENS_FLAG + "="):
            kept.append(argument)
    return kept


def sweep(argv: Sequence[str], target: str, plot: str, as_json: bool, out: Any) -> int:
    """Print the table (or JSON), write the plot; returns 0, or 2 when every T is refused."""
    base = without_tokens(argv)
    points = []
    for tokens in TOKENS:
        answer = plan_launch([*base, MAX_TOKENS_FLAG, str(tokens)], target)
        errors = answer["errors"]
        if not errors and not answer["capability"]["use_batched_dp_moe"]:
            verdict = "not batched"
        else:
            verdict = errors[0]["limit"] if errors else "ok"
        points.append(
            Point(
                tokens=tokens,
                steps=prefill_steps(tokens, answer["attn_tp_size"]),
                running=answer["max_running_requests"] or 0,
                buffer_bytes=answer["rdma_buffer_bytes"],
                device_bytes=answer["rdma_device_bytes"],
                workspace_bytes=answer["workspace_bytes"],
                mem_fraction=(answer["resolved"] or {}).get("mem_fraction_static"),
                verdict=verdict,
            )
        )
    Path(plot).write_text(svg(points, f"tokens per rank, {target}"), encoding="utf-8")
    if as_json:
        print(json.dumps({"points": [point.as_dict() for point in points], "plot": plot}), file=out)
    else:
        print(f"{table(rows(points))}\nplot: {plot}", file=out)
    return 0 if any(point.verdict == "ok" for point in points) else REFUSED
