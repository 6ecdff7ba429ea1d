"""``moe-plugin plan --sweep``: the same launch, resolved by the host once per T."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...cli.main import REFUSED
from ...cli.tables import table_for
from ...errors import ConfigError, explain
from ...planning.sweep import TOKENS, Point, plot_suffixes, prefill_steps, rows
from ...planning.sweep import plot as draw_plot
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


def _plot_path(plot: str) -> Path:
    """Where the plot goes; refused before the launch is resolved ten times."""
    path, known = Path(plot), plot_suffixes()
    if path.suffix not in known or not path.parent.is_dir():
        raise ConfigError(
            explain(
                "plot of a sweep",
                got=plot,
                allowed=f"a file in a folder that exists, ending with {', '.join(known)}",
                fix="--sweep trade.svg, or --sweep alone for the table",
            )
        )
    return path


def sweep(argv: Sequence[str], target: str, plot: str, as_json: bool, out: Any) -> int:
    """Print the table (or JSON), write the plot unless its path is empty; returns 0, or 2 when
    every T is refused."""
    path = _plot_path(plot) if plot else None
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
    if as_json:
        print(json.dumps({"points": [point.as_dict() for point in points], "plot": plot}), file=out)
    else:
        print(table_for(out)(rows(points)), file=out)
    if path is not None:
        draw_plot(points, f"tokens per rank, {target}", path)
    return 0 if any(point.verdict == "ok" for point in points) else REFUSED
