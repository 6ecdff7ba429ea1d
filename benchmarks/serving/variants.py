"""What is compared: the launches by name, and what every launch of one bench has in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from gpu_environment import ONE_HOST

DEEPEP = ("--moe-a2a-backend", "deepep", "--deepep-mode", "low_latency")
BY_HAND_TOKENS = 256
BY_HAND_ENV = {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": str(BY_HAND_TOKENS)}
STOCK_ENV = {"MOE_PLUGIN_DISABLE": "1"}
ON = ("--use-batched-dp-moe", "on")
LOCAL_ENDS = ("--moe-dense-tp-size", "1", "--enable-dp-lm-head")  # nothing joins the DP groups

STOCK_TP = ("a", "t")
STOCK_DP = ("b", "g", "k")  # a DP group on every GPU, like ours
OURS = ("c", "d")  # the first letters
EXTRAS = {
    "mixed": ("--enable-mixed-chunk",),
    "delay": ("--enable-prefill-delayer",),
    "auto": ("--deepep-mode", "auto"),
    # The whole of a prefill step in one graph, attention included, where the default graphs stop at
    # every layer's. Slots for requests: those that decode ride along with a chunk.
    "full": (
        "--cuda-graph-config",
        '{"prefill": {"backend": "full", "full_prefill_max_req": 272}}',
    ),
}
"""The host's own ways to let prompts and decoding requests wait less for each other, and for the
CPU, tried as ``c+auto``."""


@dataclass(frozen=True)
class Variant:
    """One way to launch the server.

    Attributes:
        name: on the command line.
        title: for people.
        args: its flags.
        env: its variables.
        dp_groups: attention-DP groups, each with a KV cache of its own.
    """

    name: str
    title: str
    args: tuple[str, ...]
    env: dict[str, str]
    dp_groups: int = 1


def attention_backend() -> str:
    """The host's default on Hopper where the stack has it, for the slim one may lack it."""
    spec = find_spec("sgl_kernel")
    folders = spec.submodule_search_locations if spec else None
    found = any(list(Path(folder).glob("flash_ops*.so")) for folder in folders or ())
    return "fa3" if found else "triton"


def on_gpu(attention: str) -> tuple[str, ...]:
    """What every launch on a GPU gets; the stack of a host without a network has no FlashInfer."""
    return ("--attention-backend", attention, "--sampling-backend", "pytorch")


def resident(kv_tokens: int) -> tuple[str, ...]:
    """Several servers share the GPUs, so none may size its KV cache by what is free when it looks.

    The host takes free memory minus (1 - fraction) of what was free before its weights, and then at
    most this many tokens. A high fraction leaves the number of tokens as the only bound that binds.
    """
    return ("--mem-fraction-static", "0.95", "--max-total-tokens", str(kv_tokens))


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
    """A variant by name; the sizes of all but ``b`` and ``d512`` are the host's own.

    Args:
        name: of the variant.
        cpu: for trying the bench itself: the stock launches are then the same plain one.
        gpus: of the server; on several, every variant but the tensor-parallel ones gets one
            attention-DP group and one expert-parallel rank for each.

    Raises:
        ValueError: no such variant or extra, or none with so many GPUs.
    """
    name, *extras = name.split("+")
    if extras:
        found = variant(name, cpu=cpu, gpus=gpus)
        more = [flag for extra in extras for flag in EXTRAS[extra]]
        title = ", ".join([found.title, *extras])
        return replace(
            found, name="+".join([name, *extras]), title=title, args=(*found.args, *more)
        )
    if cpu and name in (*STOCK_TP, *STOCK_DP):
        return Variant(name, "stock on CPU", (), STOCK_ENV)
    several = gpus > 1
    size = ("--tp-size", str(gpus)) if several else ()
    experts = ("--ep-size", str(gpus)) if several else ()
    groups = (*size, "--attn-dp-size", str(gpus)) if several else ()
    if cpu and groups:
        groups = (*groups, "--enable-dp-lm-head")  # otherwise logits go through a Triton kernel
    env = ONE_HOST if several else {}
    stock = env | STOCK_ENV
    if name == "a":
        return Variant(name, "stock, tensor parallel" if several else "stock", size, stock)
    if name == "t" and several:
        title = "stock, tensor-parallel attention, experts in parallel"
        return Variant(name, title, (*size, *experts), stock)
    if name == "g" and several:
        title = "stock, attention DP + EP, no all-to-all"
        return Variant(name, title, (*groups, *experts), stock, gpus)
    if name == "b":
        args = (*groups, *by_hand(gpus))
        title = "stock DeepEP + DeepGEMM by hand"
        return Variant(name, title, args, stock | BY_HAND_ENV, gpus)
    if name == "k":
        ends = LOCAL_ENDS if several else ()
        args = (*groups, *experts, "--moe-a2a-backend", "megamoe", *ends)
        return Variant(name, "stock megamoe (FP8)", args, stock, gpus)
    if name == "c":
        return Variant(name, "ours", (*groups, *ON), env, gpus)
    if name[0] == "d" and name[1:].isdigit():
        tokens = ("--batched-dp-moe-max-tokens", name[1:])
        return Variant(name, f"ours, T = {name[1:]}", (*groups, *ON, *tokens), env, gpus)
    raise ValueError(
        f"unknown variant {name!r} with {gpus} GPUs: a, b, k, c, or d and its T, such as d512; "
        "with several GPUs also t and g"
    )


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
