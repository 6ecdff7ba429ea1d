"""Tokens per rank against what they cost and buy: rows of a table, and a plot as plain SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .memory_record import PROMPTS
from .row_budgets import ceil_div

TOKENS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Tokens per rank that are tried."""


@dataclass(frozen=True, slots=True)
class Point:
    """One T.

    Attributes:
        tokens: tokens per rank.
        steps: prefill forwards of one prompt, for each of :data:`PROMPTS`.
        running: running requests over all groups.
        buffer_bytes: DeepEP's size hint, bytes per rank.
        device_bytes: device memory of that buffer, bytes per rank.
        workspace_bytes: experts' working memory, bytes per rank.
        mem_fraction: what the host keeps for weights and KV cache.
        verdict: ``ok``, or the limit that refused it.
    """

    tokens: int
    steps: tuple[int, ...]
    running: int
    buffer_bytes: int
    device_bytes: int
    workspace_bytes: int
    mem_fraction: float | None
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with the prompt lengths spelled out."""
        raw = asdict(self)
        raw["steps"] = dict(zip(map(str, PROMPTS), self.steps, strict=True))
        return raw


def prefill_steps(tokens: int, attn_tp_size: int) -> tuple[int, ...]:
    """Forwards that one prompt takes alone: its time to first token counts in these."""
    return tuple(ceil_div(prompt, tokens * attn_tp_size) for prompt in PROMPTS)


def rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """The table, head first. Bytes in GiB per rank."""
    head = ("T", *(f"steps for {prompt}" for prompt in PROMPTS), "running", "buffer GiB")
    table: list[tuple[str, ...]] = [
        (*head, "on device GiB", "workspace GiB", "mem fraction", "verdict")
    ]
    for point in points:
        sizes = (point.buffer_bytes, point.device_bytes, point.workspace_bytes)
        table.append(
            (
                str(point.tokens),
                *map(str, point.steps),
                str(point.running),
                *(f"{size / 2**30:.2f}" for size in sizes),
                "-" if point.mem_fraction is None else f"{point.mem_fraction:.3f}",
                point.verdict,
            )
        )
    return table


_WIDTH, _HEIGHT, _LEFT, _TOP = 640, 360, 70, 40


def svg(points: Sequence[Point], title: str) -> str:
    """Prefill steps of the longest prompt (left axis) and bytes (right axis) over T."""
    good = [point for point in points if point.verdict == "ok"]
    right, bottom = _WIDTH - _LEFT, _HEIGHT - 50
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_WIDTH // 2}" y="20" text-anchor="middle">{title}</text>',
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}V{_TOP}" fill="none" stroke="#444"/>',
    ]
    if good:
        top_steps = max(point.steps[-1] for point in good)
        gib = [(point.device_bytes + point.workspace_bytes) / 2**30 for point in good]
        top_gib = max(max(gib), 0.01)
        span = max(point.tokens for point in good)
        xs = [_LEFT + (right - _LEFT) * point.tokens / span for point in good]

        def curve(values: Sequence[float], top: float, colour: str) -> str:
            ys = [bottom - (bottom - _TOP) * value / top for value in values]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
            return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'

        lines.append(curve([point.steps[-1] for point in good], top_steps, "#c0392b"))
        lines.append(curve(gib, top_gib, "#2c6fbb"))
        for x, point in zip(xs, good, strict=True):
            lines.append(
                f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{point.tokens}</text>'
            )
        lines += [
            f'<text x="{_LEFT - 6}" y="{_TOP + 4}" text-anchor="end" fill="#c0392b">'
            f"{top_steps}</text>",
            f'<text x="{right + 6}" y="{_TOP + 4}" fill="#2c6fbb">{top_gib:.1f} GiB</text>',
        ]
    lines += [
        f'<text x="{_LEFT}" y="{_HEIGHT - 12}" fill="#c0392b">prefill steps of a '
        f"{PROMPTS[-1]}-token prompt</text>",
        f'<text x="{right}" y="{_HEIGHT - 12}" text-anchor="end" fill="#2c6fbb">'
        "buffer + workspace, GiB per rank</text>",
        f'<text x="{_WIDTH // 2}" y="{_HEIGHT - 12}" text-anchor="middle">T</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
