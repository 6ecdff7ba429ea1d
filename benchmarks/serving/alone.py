"""Stage `start`: ours alone, with no flag beyond its own, serving whatever comes."""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import served
import startup
from common import Bench
from servers import Detached


def stage_start(bench: Bench) -> None:
    """Start phases, mixed prompts, clients that go away, planned and measured memory."""
    server = bench.launch(bench.variant("c"), bench.model(), bench.alone_args())
    report = bench.report
    try:
        watch = startup.Watch(server, time.monotonic())
        report["failed"] = startup.wait_ready([watch], bench.options.timeout)
        report["startup"] = [startup.describe(watch)]
        bench.save()
        if report["failed"]:
            return
        answered = served.mixed(server, 1000 if bench.cpu else 4000)
        report["served"] = [{"variant": "c", **answered}]
        report["disconnect"] = _disconnect(server)
        server.idle()
        report["again"] = len(server.generate("again", 8)["tokens"]) == 8
        report["memory"] = {"c": served.memory(server, alone=True)}
        report["states"] = server.states()
        report["compiled"] = [server.compiled()]
    finally:
        server.stop()
        log = bench.options.out / f"serving-start-{bench.stamp}.log"
        log.write_text(server.tail(400_000))


def _disconnect(server: Detached) -> str:
    """A client that goes away in the middle, and an abort of everything."""
    client = subprocess.Popen(
        [
            "curl", "-sN", "-m", "1", f"{server.url}/generate", "-H",
            "Content-Type: application/json", "-d",
            json.dumps({"text": "x" * 300, "stream": True,
                        "sampling_params": {"max_new_tokens": 4000, "ignore_eos": True}}),
        ],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    client.wait()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.generate, "abort me " * 20, 1500)
        time.sleep(1)
        server.post("/abort_request", {"rid": "", "abort_all": True})
        reason = running.result()["meta"]["finish_reason"]
    return str(reason)
