"""Servers that outlive the command that started them: one command starts, another stops them.

Each server leads a session of its own and writes its log to a file; a state file names ports,
process ids, logs and caches. They are ended by their process group, never by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from serving.server import LAUNCH_SERVER, Server, ServerDied, cpu_env, free_port
from variants import Variant, cache_env

TAIL_BYTES = 6000
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
_PREFILL = re.compile(rb"Prefill batch.* graph: (True|False)")


@dataclass
class Record:
    """What another command needs to know of a running server."""

    variant: str
    title: str
    args: list[str]
    port: int
    pid: int
    log: str
    cache: str
    cold: bool
    cached_at_ready: list[str] = field(default_factory=list)


class Detached(Server):
    """A running server by its record; HTTP calls as for any other server."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.port = record.port
        self.url = f"http://127.0.0.1:{record.port}"

    def tail(self, size: int = TAIL_BYTES) -> str:
        """The end of its log."""
        return Path(self.record.log).read_text(errors="replace")[-size:].replace("\r", "\n")

    def alive(self) -> bool:
        """Whether the process that was started still runs."""
        pid = self.record.pid
        return pid in group_members(pid) and not _is_another(pid, str(self.port))

    def log_bytes(self) -> int:
        """How long its log is by now."""
        return Path(self.record.log).stat().st_size

    def prefills(self, since: int = 0) -> list[bool]:
        """Whether each prefill batch that it logged past ``since`` bytes replayed a graph."""
        with Path(self.record.log).open("rb") as file:
            file.seek(since)
            return [found == b"True" for found in _PREFILL.findall(file.read())]

    def answers(self) -> bool:
        """Whether the health check, which generates a token, succeeds."""
        try:
            with urllib.request.urlopen(f"{self.url}/health_generate", timeout=30) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def cached(self) -> list[str]:
        """Files in its caches of compiled kernels."""
        root = Path(self.record.cache)
        found = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock")
        return sorted(str(path.relative_to(root)) for path in found)

    def compiled(self) -> dict[str, Any]:
        """Kernels that were compiled since it was ready, by the names of their files."""
        new = set(self.cached()) - set(self.record.cached_at_ready)
        # Triton keeps several files of each, and one that groups them.
        names = {Path(file).name.removeprefix("__grp__").split(".")[0] for file in new}
        record = self.record
        return {"variant": record.variant, "cold": record.cold, "kernels": sorted(names)}

    def idle(self) -> None:
        """End every request, wait until none runs, and forget all prefixes."""
        self.post("/abort_request", {"rid": "", "abort_all": True})
        for _ in range(50):
            try:
                self.post("/flush_cache?timeout=10", {})
                return
            except urllib.error.HTTPError:
                time.sleep(0.1)
        raise ServerDied(f"{self.record.variant}: requests do not end\n{self.tail()}")

    def stop(self) -> None:
        stop_group(self.record.pid, str(self.port))


def launch(
    variant: Variant,
    model: Path,
    work: Path,
    more: Sequence[str],
    *,
    cold: bool,
    cpu_ranks: int = 0,
) -> Detached:
    """Start a server that outlives this process; ``cold`` empties its caches first."""
    cache = work / "caches" / variant.name
    if cold:
        shutil.rmtree(cache, ignore_errors=True)
    was_empty = not cache.exists()
    cache.mkdir(parents=True, exist_ok=True)
    port = free_port()
    log = work / f"{variant.name}-{time.strftime('%H%M%S')}.log"
    args = [*more, *variant.args]
    address = ("--host", "127.0.0.1", "--port", str(port))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*LAUNCH_SERVER, "--model-path", str(model), *address, *args],
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "PYTHONSAFEPATH": "1",  # our `kernels/` must not hide Hugging Face's package
                "PYTHONUNBUFFERED": "1",
                **(cpu_env(cpu_ranks) if cpu_ranks else {}),
                **cache_env(cache),
                **variant.env,
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=work,  # the checkout may change below a server that runs on
        )
    return Detached(
        Record(
            variant.name, variant.title, args, port, process.pid, str(log), str(cache), was_empty
        )
    )


def save_state(work: Path, servers: Sequence[Detached]) -> None:
    """Write the state file."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "servers.json").write_text(json.dumps([asdict(s.record) for s in servers], indent=1))


def load_state(work: Path) -> list[Detached]:
    """The servers of the state file; none where there is no file."""
    path = work / "servers.json"
    if not path.exists():
        return []
    records: list[dict[str, Any]] = json.loads(path.read_text())
    return [Detached(Record(**record)) for record in records]


def group_members(group: int) -> list[int]:
    """Processes of a process group that still run, zombies left out."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(pid) == group and psutil.Process(pid).status() not in ENDED:
                members.append(pid)
    return members


def _is_another(pid: int, port: str) -> bool:
    """Whether the id belongs to a process that is not the server on this port: ids are reused."""
    with contextlib.suppress(psutil.Error):  # ended, and perhaps a zombie
        return port not in psutil.Process(pid).cmdline()
    return False


def stop_group(pid: int, port: str) -> None:
    """End a server and its children: politely, then for good; wait until they are gone."""
    if _is_another(pid, port):
        return
    for sent, patience_s in ((signal.SIGTERM, 4.0), (signal.SIGKILL, 20.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, sent)
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if not group_members(pid):
                return
            time.sleep(0.1)
    print(f"process group {pid} did not end", file=sys.stderr)
