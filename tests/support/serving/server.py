"""Start, watch and stop a real SGLang server on loopback, and talk to it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

PLATFORM = "moe_plugin_cpu"
START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 300.0
_TAIL_LINES = 40

SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")
LAUNCH_SERVER = (sys.executable, "-m", "sglang.launch_server")

# fp32 so that two routes to the same sum differ by rounding only.
COMMON_ARGS = (
    "--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native",
    "--sampling-backend", "pytorch", "--max-total-tokens", "16384", "--context-length", "2048",
    "--disable-radix-cache", "--random-seed", "0",
    "--sleep-on-idle",  # otherwise each idle rank polls at the cost of a core
)  # fmt: skip
TWO_EP_RANKS = (
    "--tp-size", "2", "--attn-dp-size", "2", "--ep-size", "2", "--enable-dp-lm-head",
)  # fmt: skip


_PORTS = range(10000, 22000)
"""Below those that Linux gives to outgoing connections, and below the host's own for its ranks."""
_DERIVED = range(233, 250)
"""Added to the server's port: its processes' sockets (`PortArgs.init_new`)."""


def free_port() -> int:
    """A loopback port that is free, and those that the host derives from it.

    The host binds it many seconds later, so no other process may get it by chance meanwhile.
    """
    ports = random.SystemRandom().sample(_PORTS, 100)
    for port in ports:
        if all(_is_free(port + more) for more in (0, *_DERIVED)):
            return port
    raise OSError(f"no free port: tried {len(ports)} of {_PORTS}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def cpu_env(ranks: int) -> dict[str, str]:
    """What a CPU server with ``ranks`` ranks needs on this machine."""
    cores = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    return {"SGLANG_PLATFORM": PLATFORM, "SGLANG_CPU_OMP_THREADS_BIND": bind}


def _end_with_parent() -> None:
    """A killed test run must not leave servers behind (Linux: prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class ServerDied(RuntimeError):
    """The server ended before it was ready; the message carries its last lines."""


class Server:
    """One server process; a context manager that stops what it started.

    Args:
        args: ``sglang.launch_server`` flags, without model, host and port.
        model: checkpoint directory.
        ranks: ranks on this machine's CPU; 0 for a server on GPUs.
        env: more environment variables.
        progress: called with each line of the server's log while it starts.
        command: how to start it; ``sglang serve`` by default.
    """

    def __init__(
        self,
        args: Sequence[str],
        model: Path,
        *,
        ranks: int = 1,
        env: Mapping[str, str] | None = None,
        progress: Callable[[str], None] = lambda _line: None,
        command: Sequence[str] = SERVE,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.lines: deque[str] = deque(maxlen=4000)
        self._progress = progress
        address = ("--host", "127.0.0.1", "--port", str(self.port))
        self.process = subprocess.Popen(
            [*command, "--model-path", str(model), *address, *args],
            env={
                **os.environ,
                **(cpu_env(ranks) if ranks else {}),
                "HF_HUB_OFFLINE": "1",
                "PYTHONSAFEPATH": "1",  # our `kernels/` must not hide Hugging Face's package
                "PYTHONUNBUFFERED": "1",
                **(env or {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # one group to end, by its pid
            preexec_fn=_end_with_parent,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            self._progress(self.lines[-1])

    def quiet(self) -> Server:
        """Stop reporting progress; returns the server."""
        self._progress = lambda _line: None
        return self

    def log(self) -> str:
        """What the server has said, as far as it is kept; safe while it says more."""
        return "\n".join(list(self.lines))

    def tail(self) -> str:
        """The server's last lines."""
        return "\n".join(list(self.lines)[-_TAIL_LINES:])

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> Server:
        """Wait until the server answers its health check.

        Raises:
            ServerDied: it ended, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self._reader.join(5)
                raise ServerDied(f"exit code {self.process.returncode}\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health_generate", timeout=30) as reply:
                    if reply.status == 200:
                        return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
        raise ServerDied(f"not ready after {timeout_s:.0f} s\n{self.tail()}")

    def wait_exit(self, timeout_s: float = START_TIMEOUT_S) -> int:
        """Wait until the process ends by itself; returns its exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(5)
        return code

    def get(self, path: str) -> Any:
        """GET a JSON document."""
        with urllib.request.urlopen(self.url + path, timeout=REQUEST_TIMEOUT_S) as reply:
            return json.loads(reply.read())

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """POST JSON, return the parsed answer, or its text where it is not JSON."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as reply:
            text = reply.read().decode()
        return json.loads(text) if text[:1] in ("{", "[") else text

    def generate(self, prompt: str, max_new_tokens: int = 16, **fields: Any) -> dict[str, Any]:
        """Greedy completion with the log-probability of every output token.

        Returns:
            ``{"tokens": [...], "logprobs": [...], "text": ..., "meta": {...}}``.
        """
        answer = self.post(
            "/generate",
            {
                "text": prompt,
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": max_new_tokens,
                    "ignore_eos": True,
                },
                "return_logprob": True,
                **fields,
            },
        )
        meta = answer["meta_info"]
        pairs = meta["output_token_logprobs"]
        return {
            "tokens": [pair[1] for pair in pairs],
            "logprobs": [pair[0] for pair in pairs],
            "text": answer["text"],
            "meta": meta,
        }

    def generate_many(
        self, prompts: Sequence[str], max_new_tokens: int = 16, concurrency: int = 8
    ) -> list[dict[str, Any]]:
        """Completions of many prompts, ``concurrency`` at a time, in order."""
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, max_new_tokens), prompts))

    def states(self) -> list[dict[str, Any]]:
        """The plugin's state in each scheduler, by HTTP; empty where it is not active."""
        info = self.get("/server_info")
        return [s["moe_plugin"] for s in info["internal_states"] if "moe_plugin" in s]

    def scrape(self) -> str:
        """What Prometheus would read; needs ``--enable-metrics``."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=REQUEST_TIMEOUT_S) as reply:
            return str(reply.read().decode())

    def stop(self) -> None:
        """End the server and its children, by their process group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
