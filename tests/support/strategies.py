"""Random launches: topologies, models, budgets, speculation, roles. Shared by property tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

CAPACITY = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
MODELS = ("qwen3", "qwen3-fp8", "qwen3-235b", "deepseek-v3", "kimi-k2", "qwen3-126")
TOKENS = (1, 8, 12, 32, 64, 100, 128, 256, 320, 512, 1000, 1024, 2048)


@st.composite
def launches(draw: st.DrawFn) -> dict[str, Any]:
    """One command line for the worker, with prompts for the admission oracle."""
    tp = draw(st.sampled_from([1, 2, 4, 8, 16]))
    dp = draw(st.sampled_from([size for size in (1, 2, 4, 8, 16) if tp % size == 0]))
    flags: dict[str, str | None] = {"--tp-size": str(tp)}
    if dp > 1 and draw(st.booleans()):
        flags |= {"--dp-size": str(dp), "--enable-dp-attention": ""}
    elif dp > 1:
        flags["--attn-dp-size"] = str(dp)
    if draw(st.booleans()):
        flags["--use-batched-dp-moe"] = "on"
    else:
        flags["--moe-a2a-backend"] = "deepep"
        flags["--deepep-mode"] = draw(st.sampled_from(["low_latency", "low_latency", "auto"]))
    role = draw(st.sampled_from(["null", "null", "null", "prefill", "decode"]))
    if role != "null":
        flags["--disaggregation-mode"] = role
    _budgets(draw, flags, tp)
    _speculation(draw, flags, dp)
    _rest(draw, flags)
    env = {}
    if draw(st.integers(0, 5)) == 5:
        env[CAPACITY] = str(draw(st.sampled_from(TOKENS)))
    if draw(st.integers(0, 9)) == 9:
        env["NVSHMEM_QP_DEPTH"] = str(draw(st.sampled_from([64, 1024, 4096])))
    lengths = draw(st.lists(st.integers(1, 20000), min_size=1, max_size=12))
    return {
        "model": draw(st.sampled_from(MODELS)),
        "flags": flags,
        "env": env,
        "requests": lengths,
    }


def _maybe(
    draw: st.DrawFn, flags: dict[str, str | None], flag: str, values: Any, odds: int
) -> None:
    if draw(st.integers(1, odds)) == odds:  # the rare case is not the one that shrinks best
        flags[flag] = str(draw(values))


def _budgets(draw: st.DrawFn, flags: dict[str, str | None], tp: int) -> None:
    tokens = st.sampled_from(TOKENS)
    scaled = st.one_of(st.sampled_from([-1, 1, 512, 4096, 8192, 32768]), tokens.map(tp.__mul__))
    _maybe(draw, flags, "--batched-dp-moe-max-tokens", tokens, 4)
    _maybe(draw, flags, "--chunked-prefill-size", scaled, 3)
    _maybe(draw, flags, "--max-running-requests", st.integers(1, 20000), 3)
    _maybe(draw, flags, "--cuda-graph-max-bs-decode", st.sampled_from([0, 1, 7, 64, 128, 512]), 4)
    _maybe(
        draw, flags, "--cuda-graph-max-bs-prefill", st.sampled_from([0, 3, 8, 100, 512, 2048]), 5
    )
    _maybe(draw, flags, "--max-prefill-tokens", st.sampled_from([256, 2048, 65536]), 8)
    _maybe(draw, flags, "--page-size", st.sampled_from([1, 16, 64, 2048]), 6)


def _speculation(draw: st.DrawFn, flags: dict[str, str | None], dp: int) -> None:
    kinds = ["", "", "", "", "EAGLE", "EAGLE", "NEXTN", "NGRAM", "DFLASH", "DSPARK"]
    kind = draw(st.sampled_from(kinds))
    # The host refuses n-gram speculation with attention DP and on pages with this backend, and
    # DSpark with attention DP and DeepEP.
    if not kind or (kind == "NGRAM" and (dp > 1 or flags.get("--page-size", "1") != "1")):
        return
    if kind == "DSPARK" and dp > 1:
        return
    flags["--speculative-algorithm"] = kind
    if kind == "NGRAM":
        _maybe(draw, flags, "--speculative-num-draft-tokens", st.integers(4, 32), 2)
        return
    flags["--speculative-draft-model-path"] = "{model}"
    if kind in ("DFLASH", "DSPARK"):
        block = f"--speculative-{kind.lower()}-block-size"
        _maybe(draw, flags, block, st.integers(2, 16), 2)
        if dp > 1:
            flags["--enable-dp-lm-head"] = ""  # or the host refuses
    elif draw(st.booleans()):
        steps = draw(st.integers(1, 6))
        flags["--speculative-num-steps"] = str(steps)
        flags["--speculative-eagle-topk"] = "1"
        flags["--speculative-num-draft-tokens"] = str(draw(st.integers(2, 8)))


def _rest(draw: st.DrawFn, flags: dict[str, str | None]) -> None:
    for flag, odds in (
        ("--enable-mixed-chunk", 4),
        ("--enable-two-batch-overlap", 8),
        ("--disable-prefill-cuda-graph", 6),
        ("--disable-decode-cuda-graph", 8),
        ("--disable-cuda-graph-padding", 10),
    ):
        if draw(st.integers(1, odds)) == odds:
            flags[flag] = ""
    blocks = flags.get("--speculative-algorithm") in ("DFLASH", "DSPARK")
    if not blocks and draw(st.integers(1, 8)) == 8:  # the host refuses them in pipelines
        flags["--pp-size"] = "2"
        if draw(st.booleans()):
            flags["--enable-dynamic-chunking"] = ""
    _maybe(draw, flags, "--ep-num-redundant-experts", st.sampled_from([2, 16, 32, 1000000]), 8)


def command_line(launch: dict[str, Any], paths: dict[str, str]) -> list[str]:
    """The launch as arguments."""
    path = paths[launch["model"]]
    argv = ["--model-path", path]
    for flag, value in launch["flags"].items():
        argv.append(flag)
        if value:
            argv.append(value.replace("{model}", path))
    return argv


def apply(launch: dict[str, Any], changes: list[list[str | None]]) -> dict[str, Any]:
    """The launch with a refusal's changes applied: flags, or variables in capitals."""
    flags, env = dict(launch["flags"]), dict(launch["env"])
    for name, value in changes:
        table = flags if name is not None and name.startswith("--") else env
        if value is None:
            table.pop(name, None)
        else:
            table[name] = value
    return {**launch, "flags": flags, "env": env}
