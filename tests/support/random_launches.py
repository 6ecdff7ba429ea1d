"""Random launches: topologies, models, formats, runners, budgets, roles, memory. One per seed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from moe_plugin.backends import BUILT_IN

from .checkpoints import BASES, FORMATS

Flags = dict[str, str]
Launch = dict[str, Any]

DEVICES = ("h100", "h200", "b200", "a100")
TOKENS = (1, 8, 12, 32, 64, 64, 100, 128, 128, 256, 256, 320, 512, 512, 1000, 1024, 1024, 2048)
RUNNERS = (
    "deep_gemm", "deep_gemm", "flashinfer_cutedsl", "flashinfer_cutedsl", "humming", "triton",
    "cutlass", "marlin", "flashinfer_trtllm", "flashinfer_cutlass", "triton_kernel",
    "flashinfer_mxfp4", "hpc_ops", "megamoe", "lora_triton",
)  # fmt: skip
QUANTIZATIONS = (
    "fp8", "humming", "humming", "modelopt_fp4", "modelopt_fp4", "w8a8_fp8", "mxfp8", "mxfp4",
    "w4afp8", "moe_wna16", "compressed-tensors", "modelopt", "modelopt_fp8",
)  # fmt: skip
_COMMON = ("bf16", "bf16", "fp8-block", "fp8-block", "ct-fp8-channel", "w4afp8", "nvfp4")
_SERVED = (
    "qwen3-30b", "qwen3-235b", "qwen3-coder-480b", "deepseek-v3", "deepseek-v3.2", "kimi-k2",
    "glm-4.5", "minimax-m2",
)  # fmt: skip
_BLOCKS = ("DFLASH", "DSPARK")


class _Draw:
    """A launch in the making."""

    def __init__(self, rng: Random) -> None:
        self.rng, self.flags, self.env = rng, Flags(), dict[str, str]()

    def one_in(self, odds: int) -> bool:
        return self.rng.randrange(odds) == 0

    def maybe(self, flag: str, values: Sequence[Any], odds: int) -> None:
        if self.one_in(odds):
            self.flags[flag] = str(self.rng.choice(values))

    def switch(self, flag: str, odds: int) -> None:
        if self.one_in(odds):
            self.flags[flag] = ""


def random_launch(seed: int, devices: Sequence[str] = DEVICES) -> Launch:
    """Launch number ``seed``: flags, variables, a device, and prompts for the host's admission."""
    draw = _Draw(Random(seed))
    rng, flags = draw.rng, draw.flags
    tp = rng.choice([1, 2, 4, 8, 8, 8, 16, 32])
    dp = rng.choice([size for size in (1, 2, 4, 8, 16, 32) if tp % size == 0])
    flags["--tp-size"] = str(tp)
    if dp > 1 and draw.one_in(2):
        flags |= {"--dp-size": str(dp), "--enable-dp-attention": ""}
    elif dp > 1:
        flags["--attn-dp-size"] = str(dp)
    _backend(draw)
    role = rng.choice(["null", "null", "null", "prefill", "decode"])
    if role != "null":
        flags["--disaggregation-mode"] = role
    _budgets(draw, tp)
    _speculation(draw, dp)
    _features(draw)
    device, form = rng.choice(list(devices)), rng.choice([*_COMMON * 8, *FORMATS])
    _experts(draw, form)
    _memory(draw)
    # Most with few layers: they are quickly built, and nothing but memory depends on their number.
    depth = rng.choice(["few"] * 5 + ["whole"])
    base = rng.choice([*_SERVED * 4, *BASES])
    return {
        "seed": seed,
        "device": device,
        "model": f"{base}/{form}/{depth}",
        "flags": flags,
        "env": draw.env,
        "requests": [rng.randint(1, 20000) for _ in range(rng.randint(1, 12))],
    }


def tokens_variable(backend: str) -> str:
    """The host's variable for T of a backend."""
    return BUILT_IN[backend].limits.tokens_variable or ""


def _backend(draw: _Draw) -> None:
    """The all-to-all, chosen by the switch, by the user, by both, or by the host."""
    rng, flags = draw.rng, draw.flags
    kind = rng.choice(["on"] * 4 + ["auto"] * 6 + ["both", "waterfill"])
    backend = rng.choice(["deepep"] * 7 + ["nixl", "mooncake", "pplx", "deepep_v2"])
    if kind == "waterfill":
        flags["--enable-waterfill"] = ""
    elif kind != "on":
        flags["--moe-a2a-backend"] = backend
        if mode := rng.choice(["low_latency", "low_latency", "auto", ""]):
            flags["--deepep-mode"] = mode
        if backend == "deepep":  # the host puts it in the place of any other
            draw.switch("--enable-waterfill", 20)
    if kind in ("on", "both"):
        flags["--use-batched-dp-moe"] = "on"
    if draw.one_in(6):
        name = flags.get("--moe-a2a-backend", "deepep")
        draw.env[tokens_variable(name)] = str(rng.choice(TOKENS))


def _budgets(draw: _Draw, tp: int) -> None:
    rng = draw.rng
    chunks = [-1, 1, 512, 4096, 8192, 32768, *(tp * tokens for tokens in TOKENS)]
    draw.maybe("--batched-dp-moe-max-tokens", TOKENS, 6)
    draw.maybe("--chunked-prefill-size", chunks, 4)
    draw.maybe("--max-running-requests", [rng.randint(1, 20000)], 4)
    draw.maybe("--cuda-graph-max-bs-decode", [0, 1, 7, 64, 64, 128, 128, 512], 6)
    draw.maybe("--cuda-graph-max-bs-prefill", [0, 3, 8, 100, 512, 2048], 8)
    draw.maybe("--max-prefill-tokens", [256, 2048, 65536], 10)
    draw.maybe("--page-size", [1, 16, 64, 2048], 8)


def _speculation(draw: _Draw, dp: int) -> None:
    rng, flags = draw.rng, draw.flags
    kind = rng.choice([""] * 6 + ["EAGLE", "EAGLE", "NEXTN", "NGRAM", "DFLASH", "DSPARK"])
    # The host refuses n-gram speculation with attention DP and on pages with this backend, and
    # DSpark with attention DP and DeepEP.
    if not kind or (kind == "NGRAM" and (dp > 1 or flags.get("--page-size", "1") != "1")):
        return
    if kind == "DSPARK" and dp > 1:
        return
    flags["--speculative-algorithm"] = kind
    if kind == "NGRAM":
        draw.maybe("--speculative-num-draft-tokens", range(4, 33), 2)
        return
    flags["--speculative-draft-model-path"] = "{model}"
    if kind in _BLOCKS:
        draw.maybe(f"--speculative-{kind.lower()}-block-size", range(2, 17), 2)
        if dp > 1:
            flags["--enable-dp-lm-head"] = ""  # or the host refuses
    elif draw.one_in(2):
        flags["--speculative-num-steps"] = str(rng.randint(1, 6))
        flags["--speculative-eagle-topk"] = "1"
        flags["--speculative-num-draft-tokens"] = str(rng.randint(2, 8))


def _features(draw: _Draw) -> None:
    flags = draw.flags
    for flag, odds in (
        ("--enable-mixed-chunk", 5),
        ("--enable-two-batch-overlap", 10),
        ("--enable-single-batch-overlap", 30),
        ("--disable-prefill-cuda-graph", 8),
        ("--disable-decode-cuda-graph", 10),
        ("--disable-cuda-graph-padding", 12),
        ("--enable-eplb", 14),
        ("--enable-deterministic-inference", 25),
        ("--disable-shared-experts-fusion", 20),
        ("--enable-dp-lm-head", 8),
    ):
        draw.switch(flag, odds)
    if flags.get("--speculative-algorithm") not in _BLOCKS and draw.one_in(10):
        flags["--pp-size"] = "2"  # in which the host refuses them
        draw.switch("--enable-dynamic-chunking", 2)
    draw.maybe("--ep-num-redundant-experts", [2, 16, 32, 32, 1000000], 12)
    draw.maybe("--moe-dense-tp-size", [1], 7)
    if draw.one_in(30):
        modules = draw.rng.choice(["q_proj", "all", "gate_up_proj down_proj"])
        flags |= {"--enable-lora": "", "--max-lora-rank": "16", "--lora-target-modules": modules}


def _experts(draw: _Draw, form: str) -> None:
    """What computes the experts, and in what their rows come."""
    if form == "nvfp4" and draw.one_in(2):
        draw.flags["--moe-runner-backend"] = "flashinfer_cutedsl"
    draw.maybe("--moe-runner-backend", RUNNERS, 6)
    draw.maybe("--quantization", QUANTIZATIONS, 14)
    draw.maybe("--deepep-dispatcher-output-dtype", ["bf16", "fp8", "nvfp4"], 14)
    draw.maybe("--dtype", ["bfloat16", "float16"], 25)
    for name, value, odds in (
        ("SGLANG_DEEPEP_BF16_DISPATCH", "1", 30),
        ("SGLANG_ENABLE_JIT_DEEPGEMM", "0", 25),
        ("SGLANG_NIXL_EP_BF16_DISPATCH", "1", 40),
        ("NVSHMEM_QP_DEPTH", draw.rng.choice(["64", "1024", "4096"]), 12),
    ):
        if draw.one_in(odds):
            draw.env[name] = value


def _memory(draw: _Draw) -> None:
    draw.maybe("--mem-fraction-static", [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95], 3)
    draw.maybe("--kv-cache-dtype", ["fp8_e4m3"], 8)
    draw.maybe("--max-total-tokens", [2048, 65536], 15)
    draw.maybe("--context-length", [4096, 32768], 8)


def command_line(launch: Launch, paths: dict[str, str]) -> list[str]:
    """The launch as arguments."""
    path = paths[launch["model"]]
    argv = ["--model-path", path]
    for flag, value in launch["flags"].items():
        argv.append(flag)
        if value:
            argv += value.replace("{model}", path).split()
    return argv


def apply(launch: Launch, changes: list[list[str | None]]) -> Launch:
    """The launch with a refusal's changes applied: flags, or variables in capitals."""
    flags, env = dict(launch["flags"]), dict(launch["env"])
    for name, value in changes:
        table = flags if name is not None and name.startswith("--") else env
        if value is None:
            table.pop(name, None)
        else:
            table[name] = value
    return {**launch, "flags": flags, "env": env}
