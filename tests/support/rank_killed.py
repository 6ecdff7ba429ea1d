"""What must happen when one rank of a running server is killed; the same on CPUs and on GPUs."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import psutil

from .serving.prompts import SHORT_PROMPTS
from .serving.server import Server

# SGLang 0.5.23 tells at once, then waits 5 s for the GPUs to settle, dumps every rank's stacks and
# waits for core dumps that CUDA may write: 60 s, unless this variable says otherwise.
EXIT_LIMIT_S = 150.0
NO_CORE_DUMPS = {"SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0"}
TITLE = "sglang::scheduler"


def scheduler_pids(server: Server) -> list[int]:
    """Processes of the server's ranks, by the title that the host gives them; in rank order."""
    titles = {}
    for child in psutil.Process(server.process.pid).children(recursive=True):
        try:
            title = " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue
        if title.startswith(TITLE):
            titles[title] = child.pid
    return [titles[title] for title in sorted(titles)]


def check_killed_rank_ends_the_server(server: Server, ranks: int, peers_hang: bool) -> float:
    """Kill the last rank while requests run; returns the seconds until the server was gone.

    The server must end by itself, in bounded time, with a message that tells why; its clients
    must get an error, not silence; and no process of it may stay.

    Args:
        server: ready to serve.
        ranks: its ranks, all on this machine.
        peers_hang: no peer reports an error of its own, so the host's watch over its children
            must.
    """
    pids = scheduler_pids(server)
    assert len(pids) == ranks, pids
    family = psutil.Process(server.process.pid).children(recursive=True)
    with ThreadPoolExecutor(2 * ranks) as pool:
        server.lines.clear()  # what is read below is of these requests
        prompts = [SHORT_PROMPTS[i % len(SHORT_PROMPTS)] for i in range(2 * ranks)]
        running = [pool.submit(server.generate, prompt, 1000) for prompt in prompts]
        _wait_until_running(server)
        assert not any(request.done() for request in running)
        killed_at = time.monotonic()
        os.kill(pids[-1], signal.SIGKILL)
        code = server.wait_exit(EXIT_LIMIT_S)
        seconds = time.monotonic() - killed_at
        errors = [request.exception(30) for request in running]
    assert code != 0
    assert all(isinstance(error, OSError | EOFError) or _is_http(error) for error in errors), errors
    log = server.log()
    told = rf"\(pid={pids[-1]}\) crashed with exit code -9"
    if not peers_hang:
        told += "|Scheduler hit an exception"  # a peer's own error came first
    assert re.search(told, log), server.tail()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, alive
    return seconds


def _is_http(error: BaseException | None) -> bool:
    import http.client

    return isinstance(error, urllib.error.URLError | http.client.HTTPException)


def _wait_until_running(server: Server, timeout_s: float = 60.0) -> None:
    """Until the log, cleared before the requests, shows a decode batch: one line in 40 steps."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if "Decode batch" in server.log():
            return
        time.sleep(0.2)
    raise AssertionError(f"no decode batch seen\n{server.tail()}")
