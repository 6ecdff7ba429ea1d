"""Keep what the host prints apart from what a command answers."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True, slots=True)
class Streams:
    """Where a command writes while the host is kept quiet.

    Attributes:
        out: standard output, for the answer alone.
        err: standard error, for messages of our own.
        log: what was printed by anything else; None where that goes to standard error.
    """

    out: IO[str]
    err: IO[str]
    log: IO[str] | None

    def why(self, exit_: SystemExit) -> str:
        """What the host said when it ended the process: the last error that it printed."""
        if isinstance(exit_.code, str):
            return exit_.code.removeprefix("error: ")
        if self.log is None:
            return "SGLang refused the command line, see above"
        sys.stderr.flush()
        self.log.seek(0)
        lines = [line for line in self.log.read().splitlines() if "error: " in line]
        return lines[-1].partition("error: ")[2] if lines else "SGLang refused the command line"


def _scratch() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


@contextlib.contextmanager
def quiet_host(verbose: bool) -> Iterator[Streams]:
    """Everything that is printed goes to standard error (``verbose``) or nowhere, whoever prints
    it; only the yielded streams reach the caller."""
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        log = (
            None if verbose else stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        )
        kept = [os.dup(descriptor) for descriptor in (1, 2)]
        out, err = (
            stack.enter_context(os.fdopen(os.dup(descriptor), "w", encoding="utf-8"))
            for descriptor in kept
        )
        sink = 2 if log is None else log.fileno()
        for descriptor in (1, 2):
            os.dup2(sink, descriptor)
        try:
            yield Streams(out, err, log)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in zip((1, 2), kept, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
