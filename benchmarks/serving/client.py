"""Stage `client`: the host's own `sglang.bench_serving` against the servers that are up."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from common import HERE, Bench
from loads import Point
from servers import Detached, load_state

LEAST_REQUESTS = 16
ROUNDS_OF_REQUESTS = 4  # for every one in flight
ARRIVALS_S = 15.0
LIMIT_S = 240.0


def stage_client(bench: Bench) -> None:
    """Every point for every variant that is asked for; its own JSON, and nothing of ours."""
    folder = str(bench.model())
    outcomes = bench.report.setdefault("client", [])
    bench.report["failed"] = []
    up = {server.record.variant: server for server in load_state(bench.options.work)}
    for point in bench.points:
        for name in bench.options.variants:
            if (server := up.get(name)) is None:
                continue
            logged = server.log_bytes()
            try:
                found = _run(bench, server, folder, point)
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                output = getattr(error, "output", "") or ""
                bench.report["failed"].append(f"{name} at {point.name}: {error}\n{output[-2000:]}")
                continue
            finally:
                bench.save()
            replayed = server.prefills(logged)
            outcomes.append(
                {
                    "variant": name,
                    "point": point.name,
                    "prefill_batches": len(replayed),
                    "prefill_eager": replayed.count(False),
                    "bench_serving": found,
                }
            )
            bench.save()
            print(_line(name, point, found), flush=True)


def arguments(point: Point, url: str, model: str) -> list[str]:
    """Flags of the host's client that ask for what the point does."""
    load = point.load
    if point.rate is None:
        count = max(LEAST_REQUESTS, ROUNDS_OF_REQUESTS * point.requests)
        pace = ["--max-concurrency", str(point.requests)]
    else:
        count = max(LEAST_REQUESTS, round(ARRIVALS_S * point.rate))
        pace = ["--request-rate", str(point.rate)]
    return [
        "--backend", "sglang", "--base-url", url, "--model", model,
        "--dataset-name", "random-ids", "--tokenize-prompt",
        "--random-input-len", str(load.prompt[1]), "--random-output-len", str(load.new[1]),
        # One ratio for both; lengths are drawn from there up to the most.
        "--random-range-ratio", str(round(load.prompt[0] / load.prompt[1], 3)),
        "--num-prompts", str(count), *pace,
        "--flush-cache", "--disable-tqdm", "--seed", "1",
    ]  # fmt: skip


def _run(bench: Bench, server: Detached, model: str, point: Point) -> dict[str, object]:
    file = bench.options.out / f"bench-serving-{server.record.variant}-{bench.stamp}.jsonl"
    asked = [*arguments(point, server.url, model), "--output-file", str(file)]
    subprocess.run(
        [sys.executable, "-P", str(HERE / "bench_serving.py"), *asked],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=min(LIMIT_S, max(1.0, bench.left_s())),
        check=True,
    )
    # One line per run; lists of every single token are not asked for.
    found: dict[str, object] = json.loads(file.read_text().splitlines()[-1])
    return found


def _line(name: str, point: Point, found: dict[str, object]) -> str:
    keys = (
        "completed", "output_throughput", "total_throughput", "median_ttft_ms", "p99_ttft_ms",
        "median_itl_ms", "p95_itl_ms", "p99_itl_ms",
    )  # fmt: skip
    return f"bench_serving {name} {point.name}: " + ", ".join(
        f"{key} {value:.1f}" for key in keys if isinstance(value := found.get(key), (int, float))
    )
