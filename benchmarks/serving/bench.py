"""The real server on one GPU: ours beside the stock host. `bench.py STAGE --out DIR`.

Stages:
    start   ours alone, with no flag about sizes: start-up phases, mixed prompts, memory
    pair    ours and the stock host resident together: correctness, alternating rounds of load

Prints a short table last; the JSON in DIR names device, versions and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests")]
from load import run_round
from serving.checkpoint import QWEN3_30B_LAYERS, write_checkpoint
from serving.prompts import long_prompt
from serving.server import LAUNCH_SERVER, Server, ServerDied

# No FlashInfer in the slim stack of a GPU host without a network.
SLIM = ("--attention-backend", "triton", "--sampling-backend", "pytorch")
OURS = ("--use-batched-dp-moe", "on")
DEEPEP = ("--moe-a2a-backend", "deepep", "--deepep-mode", "low_latency")
BY_HAND = (
    *DEEPEP, "--moe-runner-backend", "deep_gemm", "--chunked-prefill-size", "256",
    "--cuda-graph-max-bs-decode", "256", "--cuda-graph-max-bs-prefill", "256",
    "--max-running-requests", "256",
)  # fmt: skip
BY_HAND_ENV = {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256"}
STOCK_ENV = {"MOE_PLUGIN_DISABLE": "1"}
VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "a stock, no all-to-all": (("--cuda-graph-max-bs-decode", "256"), STOCK_ENV),
    "b stock DeepEP + DeepGEMM by hand": (BY_HAND, BY_HAND_ENV | STOCK_ENV),
    "c ours": (OURS, {}),
}
PHASES = (
    "Load weight end", "expert kernels ready", "KV Cache is allocated", "Capture cuda graph begin",
    "Capture cuda graph end", "Capture prefill", "The server is fired up",
)  # fmt: skip


def environment() -> dict[str, str]:
    """What a figure depends on."""
    packages = ("sglang", "torch", "triton", "sgl-deep-ep", "sgl-deep-gemm")
    found = {name: _version(name) for name in packages}
    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        **found,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # an unpacked tree without metadata
        return "unknown"


def start(name: str, model: Path, *more: str) -> tuple[Server, float]:
    """A server of one variant and the time its start began."""
    args, env = VARIANTS[name]
    server = Server((*SLIM, *args, *more), model, ranks=0, env=env, command=LAUNCH_SERVER)
    return server, time.monotonic()


def phases(server: Server) -> list[str]:
    """Log lines that mark the phases of a start."""
    return [line for line in server.lines if any(phase in line for phase in PHASES)]


def stage_start(model: Path) -> dict[str, Any]:
    """Ours, with no flag beyond its own: does it start, and serve whatever comes?"""
    report: dict[str, Any] = {}
    server, began = start("c ours", model)
    with server:
        try:
            server.wait_ready(400)
        except ServerDied as error:
            return {"died": str(error)[-6000:]}
        report["ready_s"] = time.monotonic() - began
        report["phases"] = phases(server)
        report["states"] = server.states()
        rng = random.Random(0)
        prompts = [long_prompt(rng.choice((1, 7, 63, 256, 257, 1000, 4000))) for _ in range(64)]
        answers = server.generate_many(prompts, 32, concurrency=64)
        report["mixed_prompts"] = {
            "requests": len(prompts),
            "answered": sum(len(a["tokens"]) == 32 for a in answers),
        }
        report["disconnect"] = _disconnect(server)
        server.post("/flush_cache", {})
        report["again"] = len(server.generate(prompts[0], 8)["tokens"]) == 8
        report["states"] = server.states()
        report["compiled_while_serving"] = [
            line for line in server.lines if "compil" in line.lower() and "Capture" not in line
        ][-5:]
        report["log"] = list(server.lines)
    return report


def _disconnect(server: Server) -> str:
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
        running = pool.submit(server.generate, "abort me " * 20, 2000)
        time.sleep(1)
        request = {"rid": "", "abort_all": True}
        server.post("/abort_request", request)
        reason = running.result()["meta"]["finish_reason"]
    return str(reason)


def stage_pair(
    model: Path, seconds: float, rounds: int, points: list[int], save: Callable[[dict], None]
) -> dict[str, Any]:
    """All variants resident together: correctness first, then alternating rounds."""
    report: dict[str, Any] = {"ready_s": {}, "rounds": []}
    servers = {name: start(name, model, "--mem-fraction-static", "0.3") for name in VARIANTS}
    try:
        for name, (server, began) in servers.items():
            server.wait_ready(450)
            report["ready_s"][name] = time.monotonic() - began
        report["phases"] = {name: phases(server) for name, (server, _) in servers.items()}
        report["states"] = servers["c ours"][0].states()
        report["logprob_distance"] = _distances({n: s for n, (s, _) in servers.items()})
        for point in points:
            for server, _ in servers.values():
                run_round(server.url, point, 2.0)
            for index in range(rounds):
                for name, (server, _) in servers.items():
                    measured = run_round(server.url, point, seconds, seed=index).summary()
                    report["rounds"].append({"variant": name, "round": index, **measured})
            save(report)  # a run that is cut short keeps what it measured
    except ServerDied as error:
        report["died"] = str(error)[-6000:]
    finally:
        report["log"] = [line for server, _ in servers.values() for line in server.lines]
        for server, _ in servers.values():
            server.stop()
    return report


def _distances(servers: dict[str, Server]) -> dict[str, float]:
    """Teacher-forced: mean distance of the same tokens' log-probabilities to (a)'s."""
    prompts = [long_prompt(n)[k:] for n, k in ((300, 0), (700, 13), (1500, 29), (260, 5))]
    forced: dict[str, list[float]] = {}
    for name, server in servers.items():
        values: list[float] = []
        for prompt in prompts:
            answer = server.post(
                "/generate",
                {
                    "text": prompt,
                    "sampling_params": {"max_new_tokens": 1},
                    "return_logprob": True,
                    "logprob_start_len": 0,
                },
            )
            values += [pair[0] for pair in answer["meta_info"]["input_token_logprobs"][1:]]
        forced[name] = values
    base, *others = forced
    return {
        f"{name} to {base}": sum(
            abs(a - b) for a, b in zip(forced[name], forced[base], strict=True)
        )
        / len(forced[base])
        for name in others
    }


def table(report: dict[str, Any]) -> str:
    """Medians by variant and concurrency."""
    lines = [f"{'variant':<36}{'conc':>6}{'tok/s':>10}{'TTFT ms':>10}{'ITL ms':>9}{'lost':>6}"]
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in report.get("rounds", []):
        cells.setdefault((row["variant"], row["concurrency"]), []).append(row)
    for (name, point), rows in sorted(cells.items(), key=lambda item: item[0][::-1]):
        values = [median(r[k] for r in rows) for k in ("tokens_per_s", "ttft_ms", "itl_ms")]
        lost = sum(r["lost"] for r in rows)
        lines.append(
            f"{name:<36}{point:>6}{values[0]:>10.0f}{values[1]:>10.1f}{values[2]:>9.2f}{lost:>6}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run one stage and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("start", "pair"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--points", type=int, nargs="+", default=[1, 16, 64, 128, 256])
    options = parser.parse_args()
    folder = Path("/tmp/moe-plugin-bench-model")
    if not (folder / "tokenizer.json").exists():
        write_checkpoint(folder, QWEN3_30B_LAYERS, dtype=torch.bfloat16, device="cuda")
        torch.cuda.empty_cache()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"serving-{options.stage}.json"

    def save(report: dict[str, Any]) -> None:
        rest = {key: value for key, value in report.items() if key != "log"}
        path.write_text(json.dumps({"environment": environment(), **rest}, indent=1))

    if options.stage == "start":
        report = stage_start(folder)
    else:
        report = stage_pair(folder, options.seconds, options.rounds, options.points, save)
    save(report)
    path.with_suffix(".log").write_text("\n".join(report.pop("log", [])))
    summary = {k: v for k, v in report.items() if k != "rounds"}
    print(json.dumps(summary, indent=1)[-7000:])
    print(table(report))
    return 1 if "died" in report else 0


if __name__ == "__main__":
    sys.exit(main())
