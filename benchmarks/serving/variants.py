"""What is compared: the launches by name, and what every launch of one bench has in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpu_environment import ONE_HOST

# No FlashInfer in the slim stack of a GPU host without a network.
SLIM = ("--attention-backend", "triton", "--sampling-backend", "pytorch")

# Several servers share the GPU, so none may size its KV cache by what is free when it looks: the
# host takes free memory minus (1 - fraction) of what was free before its weights, and then at most
# this many tokens. A high fraction leaves the number of tokens as the only bound that binds.
KV_TOKENS = 131072  # 256 requests of up to 320 tokens, and prompts of 4,000; 2 GiB for eight layers
RESIDENT = ("--mem-fraction-static", "0.95", "--max-total-tokens", str(KV_TOKENS))

DEEPEP = ("--moe-a2a-backend", "deepep", "--deepep-mode", "low_latency")
BY_HAND_TOKENS = 256
BY_HAND_ENV = {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": str(BY_HAND_TOKENS)}
STOCK_ENV = {"MOE_PLUGIN_DISABLE": "1"}
ON = ("--use-batched-dp-moe", "on")


@dataclass(frozen=True)
class Variant:
    """One way to launch the server.

    Attributes:
        name: ``a``, ``b``, ``c``, ``e``, or ``d`` followed by its T.
        title: for people.
        args: its flags.
        env: its variables.
    """

    name: str
    title: str
    args: tuple[str, ...]
    env: dict[str, str]


def by_hand(gpus: int) -> tuple[str, ...]:
    """What makes the stock host's DeepEP start and serve; the host divides the first and the last
    by the attention-DP groups."""
    return (
        *DEEPEP, "--moe-runner-backend", "deep_gemm",
        "--chunked-prefill-size", str(BY_HAND_TOKENS * gpus),
        "--cuda-graph-max-bs-decode", str(BY_HAND_TOKENS),
        "--cuda-graph-max-bs-prefill", str(BY_HAND_TOKENS),
        "--max-running-requests", str(BY_HAND_TOKENS * gpus),
    )  # fmt: skip


def variant(name: str, *, cpu: bool = False, gpus: int = 1) -> Variant:
    """A variant by name; ``d512`` is ours with T = 512, ``e`` leaves mixed steps eager.

    Args:
        name: of the variant.
        cpu: for trying the bench itself: the stock launches are then the same plain one.
        gpus: of the server; on several, DeepEP gets one attention-DP group and one expert-parallel
            rank for each, and the host without all-to-all is tensor-parallel.
    """
    if cpu and name in ("a", "b"):
        return Variant(name, "stock on CPU", (), STOCK_ENV)
    size = ("--tp-size", str(gpus)) if gpus > 1 else ()
    ranks = (*size, "--attn-dp-size", str(gpus)) if gpus > 1 else ()
    if cpu and ranks:
        ranks = (*ranks, "--enable-dp-lm-head")  # otherwise logits go through a Triton kernel
    env = ONE_HOST if gpus > 1 else {}
    if name == "a":
        return Variant(name, "stock, no all-to-all", size, env | STOCK_ENV)
    if name == "b":
        args = (*ranks, *by_hand(gpus))
        title = "stock DeepEP + DeepGEMM by hand"
        return Variant(name, title, args, env | BY_HAND_ENV | STOCK_ENV)
    if name == "c":
        return Variant(name, "ours", (*ranks, *ON), env)
    if name == "e":
        eager = {"MOE_PLUGIN_REPLAY_MIXED_STEPS": "0"}
        return Variant(name, "ours, mixed steps eager", (*ranks, *ON), env | eager)
    if name[0] == "d" and name[1:].isdigit():
        tokens = ("--batched-dp-moe-max-tokens", name[1:])
        return Variant(name, f"ours, T = {name[1:]}", (*ranks, *ON, *tokens), env)
    raise ValueError(f"unknown variant {name!r}: a, b, c, e, or d and its T, such as d512")


def cache_env(folder: Path) -> dict[str, str]:
    """Every cache of compiled kernels below ``folder``: empty means cold, and growth is seen."""
    names = {
        "SGLANG_CACHE_DIR": "sglang",
        "SGLANG_JIT_CACHE_DIR": "sglang-jit",
        "SGLANG_DG_CACHE_DIR": "deep_gemm",
        "DG_JIT_CACHE_DIR": "deep_gemm",
        "EP_JIT_CACHE_DIR": "deep_ep",
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "CUDA_CACHE_PATH": "cuda",
        "TVM_FFI_CACHE_DIR": "tvm-ffi",
        "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    }
    return {variable: str(folder / name) for variable, name in names.items()}
