"""The serving benchmark without servers: client, ratios, phases, joined reports, checkpoints."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from aiohttp import web
from safetensors import safe_open

sys.path += [
    str(Path(__file__).parents[2] / "benchmarks" / "serving"),
    str(Path(__file__).parents[2] / "benchmarks"),
    str(Path(__file__).parents[1] / "support"),
]
import client
import loads
import models
import ratios
import report
import startup
import streams
import tables
import variants
from counts import Counts
from serving.checkpoint import Shape, write_checkpoint

TOKEN_S = 0.002
SENT: list[tuple[float, int]] = []
"""When `_stream` sent how many tokens, on the client's clock."""


async def _stream(request: web.Request) -> web.StreamResponse:
    """A token every TOKEN_S; the first alone, the rest in the groups that were asked for."""
    asked = (await request.json())["sampling_params"]
    reply = web.StreamResponse()
    await reply.prepare(request)
    seen, total, group = 0, asked["max_new_tokens"], asked["stream_interval"]
    while seen < total:
        more = 1 if seen == 0 else min(group, total - seen)
        await asyncio.sleep(TOKEN_S * more)
        seen += more
        event = json.dumps({"meta_info": {"completion_tokens": seen}})
        SENT.append((time.perf_counter(), more))
        await reply.write(f"data: {event}\n\n".encode())
    await reply.write(b"data: [DONE]\n\n")
    return reply


async def _silent(_request: web.Request) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


async def _refuse(_request: web.Request) -> web.Response:
    return web.Response(status=500)


async def _counts(
    handler: Any, workers: int, rate: float | None = None
) -> tuple[streams.Job, Counts]:
    app = web.Application(client_max_size=2**22)
    app.router.add_post("/generate", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    job = streams.Job(
        f"http://127.0.0.1:{port}",
        tuple(range(workers)),
        "seed",
        replace(loads.LOADS["short"], patience_s=1.0),
        rate=rate,
        starts=time.perf_counter(),
        lead_s=0.3,
        seconds=1.0,
    )
    try:
        return job, await streams.share_of_round(job)
    finally:
        await runner.cleanup()


def test_client_counts_what_arrives_within_the_window() -> None:
    """Against what was sent within it, but for the groups on their way at either end."""
    SENT.clear()
    job, counts = asyncio.run(_counts(_stream, 8))
    within = sum(tokens for at, tokens in SENT if job.begin <= at < job.end)
    cut_off = 8 * job.stream_interval
    assert counts.lost == 0
    assert abs(counts.tokens - within) <= 2 * cut_off < within / 2
    # A stream's mean time per token: no faster than it was sent, but for a late first event.
    assert counts.between_s
    assert median(counts.between_s) >= 0.9 * TOKEN_S
    assert counts.first_s
    # Of each worker one request may be sent before the window or get its first token after it.
    least, most = job.load.prompt
    firsts = len(counts.first_s)
    assert least * (firsts - 8) <= counts.prompt_tokens <= most * (firsts + 8)
    figures = counts.figures(job.seconds)
    assert figures["total_tokens_per_s"] == counts.tokens + counts.prompt_tokens
    assert figures["ttft_p50_ms"] <= figures["ttft_p95_ms"] <= figures["ttft_p99_ms"]
    assert figures["itl_p99_ms"] >= 1e3 * TOKEN_S


def test_client_counts_refused_requests_as_lost() -> None:
    _, counts = asyncio.run(_counts(_refuse, 2))
    assert counts.lost >= 2
    assert counts.tokens == counts.done == 0
    assert "500" in counts.error


def test_client_counts_requests_that_hang_as_lost() -> None:
    """They neither fail nor end while their round lasts; how long they waited is no less."""
    job, counts = asyncio.run(_counts(_silent, 3))
    assert counts.lost == counts.waiting == 3
    assert "no token in" in counts.error
    assert not counts.first_s  # sent before counting began
    assert job.seconds + streams.GRACE_S > job.load.patience_s


def test_arrivals_at_random_do_not_wait_for_answers() -> None:
    """As many as the rate says, though nobody is answered; those sent meanwhile have waited."""
    job, counts = asyncio.run(_counts(_silent, 2, rate=20.0))
    expected = 2 * 20 * (job.lead_s + job.seconds)
    assert abs(counts.waiting - expected) < 4 * math.sqrt(expected)
    assert 0 < len(counts.first_s) < counts.waiting
    assert max(counts.first_s) >= streams.GRACE_S


def test_prompts_share_what_their_load_says() -> None:
    shared = loads.LOADS["shared"]
    job = streams.Job("", (0,), "seed", shared)
    prompts = [streams.draw(job, random.Random(n), n)[0] for n in range(2 * streams.PREFIXES)]
    begins = {tuple(prompt[: shared.shared]) for prompt in prompts}
    assert len(begins) == streams.PREFIXES
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert shared.prompt[0] <= len(prompt) <= shared.prompt[1]


def test_points_by_name() -> None:
    points = loads.parse(["64", "chat/256", "chat@2.5", "deep"])
    assert [point.name for point in points] == [
        "short/64",
        "chat/256",
        "chat@2.5",
        "deep/1",
        "deep/16",
    ]
    every = [point.name for point in loads.parse(["all"])]
    assert {name.split("/")[0].split("@")[0] for name in every} == set(loads.LOADS)
    assert len(set(every)) == len(every)
    for wrong in ("wide/64", "chat/", "chat@", "/64", ""):
        with pytest.raises(ValueError, match="a point must be"):
            loads.parse([wrong])


def test_kv_cache_holds_what_is_in_flight() -> None:
    """All of a point's mean requests, at least the longest one; for each DP group its share."""
    points = loads.parse(["chat/256", "deep/1"])
    chat, deep = (point.load for point in points)
    assert loads.kv_tokens(points, 1) >= 256 * chat.mean
    assert 128 * chat.mean <= loads.kv_tokens(points, 2) < loads.kv_tokens(points, 1)
    assert loads.kv_tokens(points, 64) >= deep.longest


def test_interval_of_known_ratios() -> None:
    """Logarithms 0.01, 0.02, 0.03: mean 0.02, standard error 0.01 / sqrt 3, t = 4.303."""
    found = ratios.interval([math.exp(x) for x in (0.01, 0.02, 0.03)])
    assert found is not None
    half = 4.303 * 0.01 / math.sqrt(3)
    assert found["ratio"] == pytest.approx(math.exp(0.02), abs=1e-4)
    assert found["low"] == pytest.approx(math.exp(0.02 - half), abs=1e-4)
    assert found["high"] == pytest.approx(math.exp(0.02 + half), abs=1e-4)
    assert ratios.interval([]) is None
    assert ratios.interval([1.1]) == {"ratio": 1.1, "low": None, "high": None, "n": 1}


def test_points_weigh_the_same_together() -> None:
    found = ratios.together([[1.0, 1.0, 1.0, 1.0], [1.21, 1.21]])
    assert found == {"ratio": 1.1, "low": 1.1, "high": 1.1, "n": 6}
    spread = ratios.together([[0.9, 1.1, 1.0], [1.2, 1.3, 1.25]])
    assert spread is not None
    assert spread["low"] < spread["ratio"] < spread["high"]


def _round(variant: str, index: int, point: int, tokens: float, lost: int = 0) -> dict[str, Any]:
    return {
        "variant": variant, "key": f"x/{point}/{index}", "concurrency": point, "lost": lost,
        "tokens_per_s": tokens, "itl_p95_ms": 1e3 * point / tokens, "ttft_ms": 10.0, "done": 1,
    }  # fmt: skip


def _part(rounds: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"environment": {"device": "x", "date": "d"}, "model": "m", "rounds": rounds, **more}


def _bars(merged: dict[str, Any]) -> dict[str, bool]:
    return {bar["bar"]: bar["ok"] for bar in merged["summary"]["bars"]}


def test_merge_pairs_rounds_and_checks_the_bars() -> None:
    one = [_round("b", i, 1, 100 + i) for i in range(3)]
    one += [_round("c", i, 1, 1.1 * (100 + i)) for i in range(3)]
    two = [_round("b", i, 64, 1000 + i) for i in range(3)]
    two += [_round("c", i, 64, 0.9 * (1000 + i), lost=1) for i in range(3)]
    start = {"phases_s": {}, "cold": True}
    starts = [
        {**start, "variant": "b", "ready_s": 100.0, "kernels_s": 9.0, "captures_s": 30.0},
        {**start, "variant": "c", "ready_s": 60.0, "kernels_s": 3.0, "captures_s": 20.0},
    ]
    memory = {"c": {"rdma_buffer_bytes": 5, "deepep_hint_bytes": 5, "alone": True,
                    "rdma_device_bytes": 2**30, "buffer_device_bytes": [2**30 - 1]}}  # fmt: skip
    compiled = [{"variant": "c", "cold": True, "kernels": ["mine", "shared"]}]
    compiled += [{"variant": "b", "cold": True, "kernels": ["shared"]}]
    merged = report.merge(
        [
            _part(one, commands=["rounds --points 1"]),
            _part(two, commands=["rounds --points 64"], memory=memory),
            _part([], startup=starts, compiled=compiled),
        ]
    )
    assert merged["commands"] == ["rounds --points 1", "rounds --points 64"]
    ratios = merged["summary"]["ratios"]
    assert ratios["c/b"]["tokens_per_s"]["short/64"]["ratio"] == 0.9
    assert ratios["c/best"]["tokens_per_s"]["short/64"]["of"] == "b"
    assert "c/tp" not in ratios
    bars = _bars(merged)
    assert bars["tokens/s at short/1: not wholly below 0.98 of the best"]
    assert not bars["tokens/s at short/64: not wholly below 0.98 of the best"]
    assert bars["itl_p95_ms at short/1: not wholly above the best's"]
    assert not bars["itl_p95_ms at short/64: not wholly above the best's"]
    assert not bars["tokens/s over all points: at least 1.15 of best"]  # 1.1 x 0.9
    assert not bars["requests lost: none"]
    assert bars["ready, cold: no later than b"]
    assert bars["kernels_s, cold: at most a third of b's"]
    assert not bars["kernels_and_captures_s, cold: at most a third of b's"]
    assert not bars["compiled while serving: nothing that b does not compile"]
    assert bars["c: buffer equals DeepEP's hint"]
    assert bars["c: device bytes within one granule above"]
    assert "MISS" in tables.table(merged)


def test_the_best_rival_is_another_at_each_point() -> None:
    """And another for each metric; tensor parallelism is a rival of its own."""
    rounds = []
    for index in range(3):
        for name, one, many in (("g", 100, 900), ("b", 90, 1000), ("a", 200, 500), ("c", 110, 950)):
            rounds.append(_round(name, index, 1, one + index) | {"ttft_p95_ms": 5.0 + one})
            rounds.append(_round(name, index, 64, many + index) | {"prefill_batches": 50})
            rounds[-1] |= {"prefill_eager": int(name == "c"), "point": "chat/64"}
    found = report.summary({"rounds": rounds})
    best, tp = (found["ratios"][f"c/{rival}"]["tokens_per_s"] for rival in ("best", "tp"))
    assert best["short/1"]["of"] == "g"
    assert best["chat/64"]["of"] == "b"
    assert found["ratios"]["c/best"]["ttft_p95_ms"]["short/1"]["of"] == "b"  # the earliest
    assert tp["short/1"]["of"] == tp["chat/64"]["of"] == "a"
    bars = _bars({"summary": found})
    assert bars["tokens/s over all points: at least 1.0 of tp"]
    assert not bars["prefill batches eager: less than 1 %"]  # 3 of 150
    assert bars["requests lost: none"]


def test_servers_of_several_gpus() -> None:
    """A rank per GPU for DeepEP; what the host divides by the groups is multiplied for it."""
    alone, four = variants.variant("b"), variants.variant("b", gpus=4)
    assert "--tp-size" not in alone.args
    flags = dict(zip(four.args[::2], four.args[1::2], strict=True))
    assert flags["--tp-size"] == flags["--attn-dp-size"] == "4"
    assert flags["--chunked-prefill-size"] == flags["--max-running-requests"] == "1024"
    assert flags["--cuda-graph-max-bs-decode"] == "256"
    size, groups, experts = (("--tp-size", "4"), ("--attn-dp-size", "4"), ("--ep-size", "4"))
    assert variants.variant("a", gpus=4).args == size
    assert variants.variant("t", gpus=4).args == size + experts
    assert variants.variant("g", gpus=4).args == size + groups + experts
    assert variants.variant("c", gpus=4).args == size + groups + variants.ON
    assert variants.variant("k", gpus=4).args[-3:] == variants.LOCAL_ENDS
    for name in "atgbkc":
        found = variants.variant(name, gpus=4)
        assert found.env["NCCL_NVLS_ENABLE"] == "0"
        assert ("MOE_PLUGIN_DISABLE" in found.env) == (name not in variants.OURS)
        assert found.dp_groups == (1 if name in variants.STOCK_TP else 4)
    for name in "tgx":
        with pytest.raises(ValueError, match="unknown variant"):
            variants.variant(name)


def test_host_client_asks_for_the_point() -> None:
    """Lengths, and either so many in flight or so many a second."""
    closed, arriving = loads.parse(["long/32", "chat@8"])
    given = client.arguments(closed, "http://x", "/m")
    flags = dict(pairwise(given))
    assert (flags["--random-input-len"], flags["--max-concurrency"]) == ("4300", "32")
    assert int(flags["--num-prompts"]) == 4 * 32
    given = client.arguments(arriving, "http://x", "/m")
    assert given[given.index("--request-rate") + 1] == "8.0"
    assert "--max-concurrency" not in given


def test_merge_keeps_the_checks_of_every_command() -> None:
    parts: list[report.Report] = [
        {"checks": {"c": {"idle ranks": "ok"}}},
        {"checks": {"c": {"seconds": 6.5}, "d512": {"idle ranks": "ok"}}},
    ]
    merged = report.merge(parts)
    assert merged["checks"] == {
        "c": {"idle ranks": "ok", "seconds": 6.5},
        "d512": {"idle ranks": "ok"},
    }


def test_merge_refuses_results_of_two_machines() -> None:
    other = _part([]) | {"environment": {"device": "y", "date": "d"}}
    with pytest.raises(ValueError, match="not of one machine"):
        report.merge([_part([]), other])


LOG = [
    (20.0, "[x] Init parallel begin."),
    (21.0, "[x] Load weight begin. avail mem=139.13 GB"),
    (21.5, "[x] moe_plugin: 4 expert kernels ready after 0.2 s"),
    (24.0, "[x] Load weight end. elapsed=2.88 s, type=Qwen3MoeForCausalLM"),
    (25.0, "[x] KV Cache is allocated. dtype: torch.bfloat16"),
    (25.0, "[x] Capture target prefill CUDA graph begin. backend=breakable"),
    (26.0, "[x] Try DeepGEMM JIT Compiling for <GROUPED_GEMM_NT_BF16_MASKED> N=1536"),
    (29.0, "DeepGEMM warmup: 100%|##########| 16384/16384 [00:03<00:00, 5000it/s]"),
    (29.1, "DeepGEMM warmup: 100%|##########| 16384/16384 [00:03<00:00, 5000it/s]"),
    (30.0, "[x] Capture target prefill CUDA graph end. elapsed=5.00 s, mem usage=0.10 GB"),
    (30.0, "[x] Capture target decode CUDA graph begin. backend=full"),
    (33.0, "[x] Capture target decode CUDA graph end. bs=[1, 2], elapsed=3.00 s, mem usage=0 GB"),
    (34.0, "[x] The server is fired up and ready to roll!"),
]


def test_ranks_compile_side_by_side() -> None:
    ready = "moe_plugin: 4 expert kernels ready after {} s"
    lines = [(1.0, f"[x DP{r} TP{r} EP{r}] {ready.format(3.0 + r)}") for r in range(2)]
    assert startup.kernel_seconds(lines) == 4.0


def test_phases_of_a_start() -> None:
    phases = startup.phases(LOG)
    assert sum(phases.values()) == 34.0
    assert phases["imports and arguments"] == 20.0
    assert phases["weights"] == 3.0
    assert phases["prefill graphs"] == 5.0
    assert startup.kernel_seconds(LOG) == pytest.approx(3.2)
    assert startup.capture_seconds(LOG) == 8.0


def _header(folder: Path) -> dict[str, tuple[str, list[int]]]:

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                piece = file.get_slice(name)
                found[name] = (piece.get_dtype(), piece.get_shape())
    return found


@pytest.mark.parametrize(
    ("name", "layers", "fp8", "other"),
    [
        ("qwen3-bf16", 8, False, False),
        ("qwen3-fp8-12", 12, True, False),
        ("qwen3-bf16-16", 16, False, False),
        ("qwen3-bf16-4-other", 4, False, True),
    ],
)
def test_model_names_say_how_deep(
    name: str,
    layers: int,
    fp8: bool,
    other: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, bool, bool]] = []

    def write(folder: Path, shape: Shape, device: str, *, fp8: bool, seed: int) -> None:
        asked.append((shape.num_hidden_layers, fp8, seed != 0))

    monkeypatch.setattr(models, "write_qwen3", write)
    models.write_model(name, tmp_path, "cpu")
    assert asked == [(layers, fp8, other)]
    assert (tmp_path / "written").exists()


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="qwen3-int4"):
        models.write_model("qwen3-int4", tmp_path, "cpu")


def test_fast_writer_writes_what_the_plain_one_does(tmp_path: Path) -> None:
    """Same names and shapes; in FP8 a scale per 128 x 128 block beside each quantised weight."""
    import torch

    shape = Shape(num_hidden_layers=2)
    plain = _header(write_checkpoint(tmp_path / "plain", shape, dtype=torch.bfloat16))
    models.write_qwen3(tmp_path / "fast", shape, "cpu", fp8=False)
    assert _header(tmp_path / "fast") == plain
    models.write_qwen3(tmp_path / "fp8", shape, "cpu", fp8=True)
    fp8 = _header(tmp_path / "fp8")
    assert {n for n in fp8 if not n.endswith("_scale_inv")} == set(plain)
    expert = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert fp8[expert] == ("F8_E4M3", [256, 128])
    assert fp8[expert + "_scale_inv"] == ("F32", [2, 1])
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(fp8)
