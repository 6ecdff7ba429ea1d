"""Where the seconds of a start go, by the lines that the server logs.

Lines are stamped when they are read, every few hundredths of a second: the host's own stamps have
whole seconds. Durations that the host prints (captures) are taken from its text.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from servers import Detached

# The last line of each phase, in the order of a start; the first hit counts.
ENDS = (
    ("imports and arguments", r"Init parallel begin"),
    ("process groups", r"Load weight begin"),
    ("weights", r"Load weight end"),
    ("KV cache", r"KV Cache (is allocated|VA upper bound)"),
    ("before prefill graphs", r"Capture .*prefill CUDA graph begin"),
    ("prefill graphs", r"Capture .*prefill CUDA graph end"),
    ("before decode graphs", r"Capture .*decode CUDA graph begin"),
    ("decode graphs", r"Capture .*decode CUDA graph end"),
    ("warm-up request", r"The server is fired up"),
)
DEEP_GEMM_BEGIN = r"Try DeepGEMM JIT Compiling"
DEEP_GEMM_END = r"DeepGEMM warmup: 100%"
OURS_READY = r"expert kernels ready after ([\d.]+) s"
KEPT = "|".join(
    [*(pattern for _, pattern in ENDS), DEEP_GEMM_BEGIN, OURS_READY, "DeepEP buffer for", "timings"]
)

Stamped = tuple[float, str]


class Watch:
    """Follows one server's log, stamping lines with the seconds since its start."""

    def __init__(self, server: Detached, began: float) -> None:
        self.server = server
        self.lines: list[Stamped] = []
        self.ready_s: float | None = None
        self.began = began
        self._offset = 0
        self._rest = b""

    def read(self) -> None:
        """Take what was written since."""
        now = time.monotonic() - self.began
        with Path(self.server.record.log).open("rb") as file:
            file.seek(self._offset)
            read = file.read()
        self._offset += len(read)
        # Progress bars end their lines with a carriage return.
        *lines, self._rest = re.split(rb"[\r\n]", self._rest + read)
        self.lines += [(now, line.decode(errors="replace")) for line in lines if line]

    def fired_up(self) -> bool:
        """Whether the host says that it is ready."""
        return any("The server is fired up" in line for _, line in self.lines)


def wait_ready(watches: Sequence[Watch], timeout_s: float) -> list[str]:
    """Read the logs until every server answers; returns how each of the others failed."""
    failed = []
    deadline = time.monotonic() + timeout_s
    waiting = list(watches)
    while waiting and time.monotonic() < deadline:
        for watch in list(waiting):
            alive = watch.server.alive()
            watch.read()
            if not alive:
                waiting.remove(watch)
                failed.append(f"{watch.server.record.variant}: ended\n{watch.server.tail()}")
            elif watch.fired_up() and watch.server.answers():
                watch.ready_s = time.monotonic() - watch.began
                watch.server.record.cached_at_ready = watch.server.cached()
                waiting.remove(watch)
        time.sleep(0.05)
    late = [f"{w.server.record.variant}: not ready\n{w.server.tail()}" for w in waiting]
    return failed + late


def describe(watch: Watch) -> dict[str, Any]:
    """The start of one server for the report."""
    record = watch.server.record
    kept = [[round(at, 2), line[:400]] for at, line in watch.lines if re.search(KEPT, line)]
    return {
        "variant": record.variant,
        "title": record.title,
        "args": record.args,
        "cold": record.cold,
        "ready_s": watch.ready_s,
        "phases_s": phases(watch.lines),
        "kernels_s": kernel_seconds(watch.lines),
        "captures_s": capture_seconds(watch.lines),
        "cached_files": len(record.cached_at_ready),
        "lines": kept,
    }


def phases(lines: Iterable[Stamped]) -> dict[str, float]:
    """Seconds of each phase that was seen, in order."""
    lines = list(lines)
    found: dict[str, float] = {}
    last = 0.0
    for name, pattern in ENDS:
        at = next((t for t, line in lines if t >= last and re.search(pattern, line)), None)
        if at is not None:
            found[name] = round(at - last, 2)
            last = at
    return found


def kernel_seconds(lines: Iterable[Stamped]) -> float:
    """Compiling or loading the experts' kernels: DeepGEMM's sessions, and our own lines, of which
    every rank has its own at the same time."""
    total, began = 0.0, None
    ours_by_rank: dict[str, float] = {}
    for at, line in lines:
        if re.search(DEEP_GEMM_BEGIN, line):
            began = at if began is None else began
        elif began is not None and re.search(DEEP_GEMM_END, line):
            total, began = total + at - began, None
        if ours := re.search(OURS_READY, line):
            rank = re.search(r" TP\d+", line)
            name = rank[0] if rank else ""
            ours_by_rank[name] = ours_by_rank.get(name, 0.0) + float(ours[1])
    return round(total + max(ours_by_rank.values(), default=0.0), 2)


def capture_seconds(lines: Iterable[Stamped]) -> float:
    """Capturing graphs, whatever is compiled meanwhile included."""
    ends = (re.search(r"CUDA graph end\b.*?elapsed=([\d.]+) s", line) for _, line in lines)
    return round(sum(float(end[1]) for end in ends if end), 2)
