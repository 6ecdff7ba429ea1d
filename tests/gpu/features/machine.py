"""Servers that share two GPUs with those of other test processes; or two CPU ranks, to try a test.

``FEATURES_ON_CPU=1`` serves a small model over the torch transport instead: flags, requests and
checks are the same, and only what needs a GPU is skipped.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from ...support import gpu_environment
from ...support.serving.server import COMMON_ARGS, LAUNCH_SERVER, Server

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
SLOTS = int(os.environ.get("FEATURES_SERVERS", "7"))
"""Servers at once, of all test processes together: each takes about 10 GiB of each GPU. Fewer test
processes than this, or each may hold one and wait for its second."""

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

    def __init__(self, *args: Any, **options: Any) -> None:
        self._place = _place()
        super().__init__(*args, progress=_log(), **options)

    def stop(self) -> None:
        super().stop()
        self._place.close()


def _place() -> IO[str]:
    """Wait for a free place; it is free again when the file is closed, or its process ends."""
    while True:
        for number in range(SLOTS):
            held = Path(f"{LOCKS}.{number}").open("w")  # noqa: SIM115, kept by the server
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return held
            held.close()
        time.sleep(0.5)


def start(
    model: Path,
    *args: str,
    kv_tokens: int = 32768,
    decode_graph: int = 64,
    env: Mapping[str, str] | None = None,
) -> Server:
    """Start a server that leaves room for others; its log goes to ``$OUT/logs``.

    Args:
        model: checkpoint directory.
        args: flags beside those that every server gets.
        kv_tokens: of its KV cache, per DP group.
        decode_graph: largest batch that is captured; 0 leaves it to the plan.
        env: more variables.
    """
    if ON_CPU:
        whole = {**QUICK_END, **(env or {})}
        return Sharing((*COMMON_ARGS, *args), model, ranks=RANKS, env=whole)
    attention = os.environ.get("FEATURES_ATTENTION", "triton")
    shared = (
        *("--attention-backend", attention, "--sampling-backend", "pytorch"),
        *("--mem-fraction-static", "0.95", "--max-total-tokens", str(kv_tokens)),
        *(("--cuda-graph-max-bs-decode", str(decode_graph)) if decode_graph else ()),
    )
    flags, whole = (*shared, *args), {**SHARED, **QUICK_END, **(env or {})}
    return Sharing(flags, model, ranks=0, env=whole, command=LAUNCH_SERVER)


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
        server.wait_ready(START_S)


@contextmanager
def turn() -> Iterator[None]:
    """One test process at a time loads its server: ranks of servers that share a GPU wait for each
    other's time slices, and a figure would be of nothing."""
    with Path(f"{LOCKS}.turn").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


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
