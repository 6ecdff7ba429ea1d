"""What goes wrong says so, and leaves nothing behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest

from ...support.hosts import program
from ...support.rank_killed import NO_CORE_DUMPS, check_killed_rank_ends_the_server
from ...support.serving.fixture_plugin import write_plugin
from .machine import (
    ON_CPU,
    OURS,
    QWEN3,
    RANKS,
    on_two_gpus,
    ready,
    sharing,
    start,
    turn,
)
from .records import See

FEATURE = "failures"
pytestmark = on_two_gpus

GONE_S = 15.0
START_S = 600.0 if ON_CPU else 300.0
ALONE = os.environ.get("FEATURES_ALONE") == "1"
KILLED = sharing(QWEN3, *OURS, "--disable-prefill-cuda-graph", decode_graph=8, env=NO_CORE_DUMPS)
DIFFERS = sharing(QWEN3, *OURS, "--disable-prefill-cuda-graph", env=NO_CORE_DUMPS)


def test_a_killed_rank(seen: See) -> None:
    """Without the host's wait for core dumps, which is 60 s where nothing else is said."""
    with start(KILLED) as server:
        ready(server)
        with turn():
            seconds = check_killed_rank_ends_the_server(server, RANKS, peers_hang=False)
    assert seconds <= GONE_S
    seen(f"a rank killed under load: all processes gone after {seconds:.1f} s", seconds=seconds)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        pytest.param("tokens", "one all-to-all for all ranks: got tokens per rank", id="tokens"),
        pytest.param(
            "memory",
            "device memory for the all-to-all's buffer: got",
            id="memory",
            marks=pytest.mark.skipif(
                ON_CPU or not ALONE,
                reason="requires GPUs that nobody else uses, and FEATURES_ALONE=1",
            ),
        ),
    ],
)
def test_a_rank_that_differs(what: str, message: str, tmp_path: Path, seen: See) -> None:
    """One rank has another T, or no memory left: both ranks raise, and the launch ends."""
    source = program("plugin_unequal_rank")
    env = write_plugin(tmp_path, "unequal", source, {"sglang.srt.plugins": "register"})
    with start(DIFFERS, env | {"UNEQUAL": what}) as server:
        family: set[psutil.Process] = set()
        told, over = None, time.monotonic() + START_S
        while server.process.poll() is None and time.monotonic() < over:
            family |= set(psutil.Process(server.process.pid).children(recursive=True))
            if told is None and message in server.log():
                told = time.monotonic()
            time.sleep(0.2)
        code, ended = server.process.poll(), time.monotonic()
        _, alive = psutil.wait_procs(family, timeout=5)
        log = server.log()
    print(server.tail())
    assert message in log, f"nobody was told: {message}"
    seconds = ended - (told or ended)  # it may end before anybody has read what it said
    assert code not in (None, 0)
    assert not alive, alive
    assert seconds <= GONE_S
    said = next(line for line in log.splitlines() if message in line)
    seen(
        f"{'another T on one rank' if what == 'tokens' else 'no memory left for the buffer'}: "
        f"told, and all gone {seconds:.1f} s later",
        seconds=round(seconds, 1),
        message=said[:300],
    )
