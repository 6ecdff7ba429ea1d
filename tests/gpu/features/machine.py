"""Servers that share two GPUs with those of other test processes; or two CPU ranks, to try a test.

``FEATURES_ON_CPU=1`` serves a small model over the torch transport instead: flags, requests and
checks are the same, and only what needs a GPU is skipped.
"""

from __future__ import annotations

import atexit
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from ...support import gpu_environment
from ...support.rank_killed import scheduler_pids
from ...support.serving.checkpoint import Shape, write_checkpoint
from ...support.serving.server import COMMON_ARGS, LAUNCH_SERVER, Server
from ...support.serving.shared_models import shared_model
from ..launches import Launch

ON_CPU = os.environ.get("FEATURES_ON_CPU") == "1"
RANKS = 2
OUT = Path(os.environ.get("OUT", "/tmp/out"))
START_S = 420.0  # several servers import and capture at once
LONG = 600 if ON_CPU else 4000
"""Tokens of a long prompt."""
LOAD_S = float(os.environ.get("FEATURES_LOAD_S", "30" if ON_CPU else "10"))
"""Of random load, where a test makes some."""
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")[:RANKS]
LOCKS = Path(tempfile.gettempdir()) / f"moe-plugin-features-{'-'.join(VISIBLE)}"
"""Of these two GPUs; others have their own."""
PLACE_GIB = 15
"""Of each GPU: what one of these servers takes at most, contexts included."""

QWEN3 = "qwen3-bf16-4"
"""Four of Qwen3-30B-A3B's layers in bf16; on a CPU a smaller model."""
QWEN3_OTHER = "qwen3-bf16-4-other"
"""The same with other weights."""
DEEPSEEK = "deepseek-v3-nextn"
"""DeepSeek-V3's shape in FP8: three layers, 32 experts and a NextN layer; not on a CPU."""

GROUPS = ("--tp-size", "2", "--attn-dp-size", "2")
ON = ("--use-batched-dp-moe", "on")
if ON_CPU:
    GROUPS = (*GROUPS, "--enable-dp-lm-head")  # logits would go through a Triton kernel otherwise
T = () if ON_CPU else ("--batched-dp-moe-max-tokens", "256")
OURS = (*GROUPS, *ON, *T)
"""Ours, with a T that leaves room on the GPUs for the other servers."""
QUICK_END = {  # a server that fails ends at once, without dumps of what its ranks were at
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
}
SHARED = gpu_environment.DEEPEP | {
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    # Unless asked for, no DeepGEMM for dense FP8 layers: its kernels compile for minutes.
    "SGLANG_ENABLE_JIT_DEEPGEMM": os.environ.get("SGLANG_ENABLE_JIT_DEEPGEMM", "0"),
}

on_two_gpus = [
    pytest.mark.gpu,
    pytest.mark.server,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        not ON_CPU and torch.cuda.device_count() < RANKS,
        reason=f"requires {RANKS} GPUs, got {torch.cuda.device_count()}",
    ),
    pytest.mark.skipif(
        not ON_CPU and importlib.util.find_spec("deep_ep") is None,
        reason="requires the deep_ep package",
    ),
]
gpu_only = pytest.mark.skipif(ON_CPU, reason="requires GPUs: a CPU server has none of it")


class Sharing(Server):
    """A server in one of the places that the GPUs have."""

    def __init__(self, launch: Launch, env: Mapping[str, str], place: bool) -> None:
        model = checkpoint(launch.model)  # nobody waits for it with a place in hand
        self._launch, self._place = launch, _take_place() if place else None
        try:
            super().__init__(
                launch.flags,
                model,
                ranks=RANKS if ON_CPU else 0,
                env={**launch.env, **env},
                progress=_log(),
                command=LAUNCH_SERVER,
            )
        except BaseException:
            self._leave_place()
            raise

    def wait_ready(self, timeout_s: float = START_S) -> Server:
        """Also, its plan is what the test is about."""
        super().wait_ready(timeout_s)
        for state in () if ON_CPU else self.states():
            found = {name: state["plan"][name] for name in self._launch.planned}
            assert found == self._launch.planned
        return self

    def stop(self) -> None:
        super().stop()
        self._leave_place()

    def _leave_place(self) -> None:
        if self._place is not None:
            _HELD.discard(self._place)
            self._place.close()


@cache
def checkpoint(name: str) -> Path:
    """The folder of a model."""
    if not ON_CPU:
        return shared_model(name)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_checkpoint(folder, Shape(num_key_value_heads=4), seed=int(name == QWEN3_OTHER))


_HELD: set[IO[str]] = set()
"""This process's places; one is free again when its file is closed, or the process ends."""


def _take_place() -> IO[str]:
    """Wait for a free place.

    A process's first one leaves another free, so that not all places are held by processes that
    wait for their second.
    """
    least = 1 if _HELD else 2
    while True:
        with _locked("places"):
            free = [file for number in range(_places()) if (file := _try(f"{LOCKS}.{number}"))]
            kept = free.pop() if len(free) >= least else None
            for file in free:
                file.close()
        if kept is not None:
            _HELD.add(kept)
            return kept
        time.sleep(0.5)


@cache
def _places() -> int:
    """Servers at once, of all test processes together."""
    if ON_CPU:
        return 2
    return max(2, torch.cuda.get_device_properties(0).total_memory // (PLACE_GIB << 30))


def _try(path: str) -> IO[str] | None:
    file = Path(path).open("w")  # noqa: SIM115, kept by the server
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def _locked(name: str) -> Iterator[None]:
    with Path(f"{LOCKS}.{name}").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def sharing(
    model: str,
    *flags: str,
    kv_tokens: int = 32768,
    decode_graph: int = 64,
    env: Mapping[str, str] | None = None,
    planned: Mapping[str, Any] | None = None,
    refused: str = "",
) -> Launch:
    """A launch that leaves room for other servers.

    Args:
        model: the name of its checkpoint.
        flags: beside those that every server gets.
        kv_tokens: of its KV cache, per DP group.
        decode_graph: largest batch that is captured; 0 leaves it to the plan.
        env: more variables.
        planned: see :class:`Launch`.
        refused: see :class:`Launch`.
    """
    if ON_CPU:
        return Launch(model, (*COMMON_ARGS, *flags), {**QUICK_END, **(env or {})})
    attention = os.environ.get("FEATURES_ATTENTION", "triton")
    shared = (
        *("--attention-backend", attention, "--sampling-backend", "pytorch"),
        *("--mem-fraction-static", "0.95", "--max-total-tokens", str(kv_tokens)),
        *(("--cuda-graph-max-bs-decode", str(decode_graph)) if decode_graph else ()),
    )
    whole = {**SHARED, **QUICK_END, **(env or {})}
    return Launch(model, (*shared, *flags), whole, planned or {}, refused)


def start(launch: Launch, env: Mapping[str, str] | None = None, *, place: bool = True) -> Server:
    """Start a server; its log goes to ``$OUT/logs``. A test has two places at most.

    Args:
        launch: how.
        env: variables that are only known now.
        place: whether it takes one; two servers with a GPU each share one.
    """
    return Sharing(launch, env or {}, place)


def _log() -> Any:
    folder = OUT / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    test = os.environ.get("PYTEST_CURRENT_TEST", "server").split("::")[-1].split(" ")[0]
    path = folder / f"{os.getpid()}-{time.monotonic_ns() // 10**6}-{test.replace('/', '_')}.log"

    def write(line: str) -> None:
        with path.open("a") as file:
            file.write(line + "\n")

    return write


def ready(*servers: Server) -> None:
    """Wait for servers that were started together."""
    for server in servers:
        server.wait_ready()


@contextmanager
def turn() -> Iterator[None]:
    """One test process at a time loads its server: ranks of servers that share a GPU wait for each
    other's time slices, and a figure would be of nothing."""
    with _locked("turn"):
        yield


def device_gib(server: Server) -> float | None:
    """Device memory of all ranks, where nvidia-smi tells it by process."""
    query = ("nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader")
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found: dict[str, float] = {}
    for pid, used in re.findall(r"^(\d+), (\d+) MiB", lines, re.MULTILINE):
        found[pid] = found.get(pid, 0) + float(used)
    mine = [found.get(str(pid), 0) for pid in scheduler_pids(server)]
    return sum(mine) / 1024 if mine and all(mine) else None


def largest_rows(server: Server) -> dict[str, int]:
    """Most rows of a dispatch by mode, over all ranks; every one within T."""
    states = server.states()
    assert states, "the plugin is active in no scheduler"
    rows: dict[str, int] = {}
    for state in states:
        most = state["plan"]["max_dispatch_tokens_per_rank"]
        for mode, seen in state["max_rows_any_rank"].items():
            assert seen <= most, f"rank {state['tp_rank']}: {seen} rows in {mode}, T is {most}"
            rows[mode] = max(seen, rows.get(mode, 0))
    return rows
