"""Tokens per rank against what they cost and buy: rows of a table, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError, explain
from .integers import ceil_div
from .memory_record import PROMPTS

TOKENS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Tokens per rank that are tried."""
_STEPS, _BYTES = "tab:red", "tab:blue"


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


def plot_suffixes() -> tuple[str, ...]:
    """What a plot's file name may end with.

    Raises:
        UnsupportedError: matplotlib, which draws it, is not installed.
    """
    return tuple(f".{kind}" for kind in sorted(_canvas().get_supported_filetypes()))


def plot(points: Sequence[Point], title: str, path: Path) -> None:
    """Draw prefill steps of the longest prompt (left) and bytes (right) over T into ``path``.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    figure = _canvas().figure
    steps = figure.subplots()
    steps.set_title(title)
    steps.set_xlabel("T, tokens per rank")
    steps.set_ylabel(f"prefill steps of a {PROMPTS[-1]}-token prompt", color=_STEPS)
    size = steps.twinx()
    size.set_ylabel("buffer + workspace, GiB per rank", color=_BYTES)
    good = [point for point in points if point.verdict == "ok"]
    tokens = [point.tokens for point in good]
    if good:
        gib = [(point.device_bytes + point.workspace_bytes) / 2**30 for point in good]
        steps.plot(tokens, [point.steps[-1] for point in good], color=_STEPS, marker=".")
        size.plot(tokens, gib, color=_BYTES, marker=".")
        steps.set_xscale("log", base=2)
        steps.set_xticks(tokens, [str(value) for value in tokens], fontsize="small")
        steps.minorticks_off()
    for axis in (steps, size):
        axis.set_ylim(bottom=0)
    figure.savefig(path)


def _canvas() -> Any:
    """A canvas without a window."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            explain(
                "plot of a sweep",
                got="no matplotlib",
                allowed="matplotlib, which draws it",
                fix="pip install matplotlib, or --sweep without a file for the table alone",
            )
        ) from None
    return FigureCanvasAgg(Figure(figsize=(7.5, 4.5), layout="constrained"))
