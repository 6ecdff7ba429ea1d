"""What must hold of one launch and its plan, by the host's own answers: one line per fault.

Nothing of the planner is asked again here. Rows, experts, weights and KV cache are the host's own
(:mod:`oracle`, :mod:`built_model`); the transports' limits are those of their documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_plugin.backends import BUILT_IN

from .random_launches import apply, tokens_variable

Launch = dict[str, Any]
Answer = dict[str, Any]
Ask = Callable[..., Answer]
"""Resolves a launch, with more keys for the worker."""

HOST_TOKENS = 128
HIDDEN_SIZES = (2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)
OURS = ("SGLANG_", "NVSHMEM_", "MOE_PLUGIN_")
ROWS_OF_FLAGS = (
    ("decode", "--max-running-requests"),
    ("decode_graph", "--cuda-graph-max-bs-decode"),
    ("prefill_buffer", "--chunked-prefill-size"),
    ("prefill_graph", "--cuda-graph-max-bs-prefill"),
)
STOCK_FAILS = ("a chunk of zero or less", "capture_bs=", "single batch overlap")
"""What the host's own code ends in when it is asked about a launch that it accepted."""


def check(launch: Launch, ask: Ask) -> tuple[str, list[str]]:
    """(what became of it, faults)."""
    answer = ask(launch, built=True)
    if answer.get("oracle"):
        return "oracle", [answer["oracle"][-1500:]]
    switch = launch["flags"].get("--use-batched-dp-moe", "auto")
    if answer["ok"] and answer["plan"]:
        faults = _rows(launch, answer) + _experts(launch, answer)
        return "ok", faults + _memory(launch, answer, ask)
    if answer["ok"]:
        faults = _untouched(launch, answer, ask)
        if "device memory" in answer["left_alone"]:
            faults += _fails_alone(launch, ask)
        return "alone", faults
    if not answer["errors"]:
        return "host", _refused_by_host(launch, answer, ask)
    faults = _fixes(launch, answer, ask)
    if switch == "auto" and "--batched-dp-moe-max-tokens" not in launch["flags"]:
        faults += _refused_under_auto(launch, answer, ask)
    return "refused", faults


def without_plugin(launch: Launch) -> Launch:
    """The same launch for the stock host: ours off, and what ``on`` selects in its place."""
    flags = {k: v for k, v in launch["flags"].items() if not k.startswith("--batched-dp-moe")}
    if flags.get("--use-batched-dp-moe") == "on":
        flags.setdefault("--moe-a2a-backend", "deepep")
        if flags["--moe-a2a-backend"] == "deepep" and flags.get("--deepep-mode", "auto") == "auto":
            flags["--deepep-mode"] = "low_latency"
    return {**launch, "flags": {**flags, "--use-batched-dp-moe": "off"}}


def bounded_rows(launch: Launch, answer: Answer, modes: list[str]) -> dict[str, int]:
    """Rows of the forward modes that this instance runs in the batched layout."""
    role = launch["flags"].get("--disaggregation-mode")
    rows = {}
    for name, value in answer["rows"].items():
        decode = name.startswith("decode")
        runs = role != ("prefill" if decode else "decode")
        if runs and ("decode" if decode else "extend") in modes:
            rows[name] = value
    return rows


def _rows(launch: Launch, answer: Answer) -> list[str]:
    plan = answer["plan"]
    tokens = plan["max_dispatch_tokens_per_rank"]
    rows = bounded_rows(launch, answer, plan["capability"]["modes"])
    faults = [f"rows: {name} {value} > {tokens}" for name, value in rows.items() if value > tokens]
    name = tokens_variable(plan["capability"]["backend"])
    exported = answer["environment"].get(name, launch["env"].get(name))
    if str(exported) != str(tokens):
        faults.append(f"capacity: {name}={exported}, T = {tokens}")
    return faults


def _experts(launch: Launch, answer: Answer) -> list[str]:
    plan, built = answer["plan"], answer["built"]
    if built["error"]:
        return []  # of the host's model code, with us or without: nothing of a plan is in there
    faults = []
    if not built["layers"]:
        faults.append("experts: no MoE layer")
    backend = BUILT_IN[plan["capability"]["backend"]]
    for layer in built["layers"]:
        if plan["runner"] == "moe_plugin":
            if layer["class"] != "DeepEPMoE" or layer["ours"].startswith("fails"):
                faults.append(f"experts: ours on {layer}")
            continue
        for rows, taken in layer["takes"].items():
            if taken.startswith("fails"):
                faults.append(f"experts: {rows} {taken} {layer['method']} {layer['runner']}")
    if backend.limits.buffer_bytes and plan["transport"] == backend.name and built["layers"]:
        most = max(layer["experts"] for layer in built["layers"])
        size = backend.limits.buffer_bytes(
            plan["max_dispatch_tokens_per_rank"], plan["hidden_size"], plan["ep_size"], most
        )
        # Some of the host's models leave redundant experts out: it has no use for them there. One
        # rank alone fuses the shared expert over backends that it does not count as DeepEP's kind.
        if size > plan["rdma_buffer_bytes"] and launch["flags"]["--tp-size"] != "1":
            faults.append(f"buffer: {plan['rdma_buffer_bytes']} planned, {size} for {most} experts")
    return faults


def _memory(launch: Launch, answer: Answer, ask: Ask) -> list[str]:
    plan, built, flags = answer["plan"], answer["built"], launch["flags"]
    memory = plan["memory"]
    if memory is None:
        return ["memory: none"]
    faults = []
    resolved = answer["resolved"]["mem_fraction_static"]
    typed = flags.get("--mem-fraction-static")
    if typed is not None and float(typed) != resolved:
        faults.append(f"memory: typed {typed} became {resolved}")
    if memory["mem_fraction_static"] != resolved:
        faults.append(f"memory: fraction {memory['mem_fraction_static']} planned, {resolved}")
    parts = ("weights", "kv_cache", "buffer", "workspace", "graphs", "activations")
    if sum(memory[f"{part}_bytes"] for part in parts) > memory["usable_bytes"]:
        faults.append("memory: parts exceed the device")
    if memory["weights_source"]:
        faults += _weights(launch, memory, built)
        if built["weights"] > memory["usable_bytes"]:  # as they are before they are quantised
            faults.append(f"memory: {built['weights']} bytes of weights to load")
        if memory["kv_cache_bytes"] <= 0:
            faults.append(f"memory: {memory['kv_cache_bytes']} bytes of KV cache")
        faults += _not_smaller(launch, answer, ask)
    return faults


def _weights(launch: Launch, memory: dict[str, Any], built: dict[str, Any]) -> list[str]:
    """Within 3 % of what the host's model has, beside what loading makes of it."""
    algorithm = launch["flags"].get("--speculative-algorithm")
    if built["error"] or algorithm not in (None, "NGRAM"):
        return []
    faults = []
    ratio = memory["weights_bytes"] / built["weights"]
    # Scales of FP4 experts are loaded in float32 and packed into a byte each, those of W4AFP8 into
    # two; weights that are quantised while they are loaded are in bf16 before.
    least = 0.85 if "fp4-experts" in launch["model"] else 0.96
    least = 0.45 if "--quantization" in launch["flags"] else least
    # Of several stages that one which holds everything that any stage may hold; and what flags ask
    # for counts, though some of the host's models do not follow them.
    flags = launch["flags"]
    most = 1.8 if "--pp-size" in flags else 1.05
    if {"--enable-dp-lm-head", "--ep-num-redundant-experts"} & set(flags):
        most = max(most, 1.6)
    if not least < ratio < most:
        faults.append(f"weights: {memory['weights_bytes']} planned, {built['weights']}")
    # Some models do not tell the host which layers a stage holds: it then counts all of them.
    staged = "--pp-size" in launch["flags"]
    token = memory["kv_token_bytes"]  # unknown where tokens share the cache with states or windows
    if not staged and token is not None and token != built["kv_token"]:
        faults.append(f"kv token: {memory['kv_token_bytes']} planned, {built['kv_token']}")
    return faults


def _not_smaller(launch: Launch, answer: Answer, ask: Ask) -> list[str]:
    """The KV cache is no smaller than the stock host's, where that has room for the buffer."""
    plain = ask(without_plugin(launch))
    if not plain["ok"] or _keeps_as_much(answer["resolved"], plain["resolved"]):
        return []
    stock = ask(without_plugin(launch), built=True)
    memory = answer["plan"]["memory"]
    if not stock["ok"] or not stock.get("built", {}).get("weights"):
        return []
    built = answer["built"]["weights"]
    if not built:
        return []
    usable = memory["usable_bytes"]
    theirs = int(usable * stock["resolved"]["mem_fraction_static"]) - stock["built"]["weights"]
    ours = int(usable * answer["resolved"]["mem_fraction_static"]) - built
    if cap := launch["flags"].get("--max-total-tokens"):
        theirs = min(theirs, int(cap) * stock["built"]["kv_token"])
    if ours >= theirs - max(usable // 400, theirs // 150):  # rounded on either side
        return []
    if _needed_of_slack(launch, answer) > usable * (1 - stock["resolved"]["mem_fraction_static"]):
        return []  # it has no room there for what the user's own values need
    return [f"kv: {(theirs - ours) / 2**30:.2f} GiB less than stock's {theirs / 2**30:.2f}"]


def _keeps_as_much(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether the fraction is no smaller, and nothing more is held whole."""
    whole = ("moe_dense_tp_size", "enable_dp_lm_head")
    return ours["mem_fraction_static"] >= theirs["mem_fraction_static"] and all(
        ours[name] == theirs[name] for name in whole
    )


def _needed_of_slack(launch: Launch, answer: Answer) -> int:
    """What runs beside weights and KV cache at the least, at the T that the user's values need: by
    the plan's own estimate, which excuses no more than the host's rule has for the same values."""
    plan = answer["plan"]
    memory, tokens = plan["memory"], _least_tokens(launch, answer)
    limits = BUILT_IN[plan["capability"]["backend"]].limits
    buffer = memory["buffer_bytes"]
    if limits.buffer_bytes and plan["transport"] == "deepep":
        buffer = limits.buffer_bytes(
            tokens, plan["hidden_size"], plan["ep_size"], plan["num_experts"]
        )
        buffer = limits.device_bytes(buffer) if limits.device_bytes else buffer
    # Received rows, gate and up, their product, and the result that combine reads, in bf16, in each
    # allocator pool; of either half where batches overlap.
    inter = max((layer["inter"] for layer in answer["built"]["layers"]), default=0)
    pools = 4 if "--enable-two-batch-overlap" in launch["flags"] else 2
    rows = 2 * pools * plan["num_experts"] * tokens * (2 * plan["hidden_size"] + 3 * inter)
    workspace = memory["workspace_bytes"] * tokens // plan["max_dispatch_tokens_per_rank"]
    planned = memory["activations_bytes"] + memory["graphs_bytes"]
    return int(buffer + min(workspace, rows) + min(planned, answer["runs"]))


def _least_tokens(launch: Launch, answer: Answer) -> int:
    """T that the user named, or the host's where the rows of what the user typed need no more."""
    plan, flags = answer["plan"], launch["flags"]
    planned, multiple = plan["max_dispatch_tokens_per_rank"], plan["token_multiple"]
    named = "--batched-dp-moe-max-tokens" in flags
    if named or tokens_variable(plan["capability"]["backend"]) in launch["env"]:
        return int(planned)
    rows = bounded_rows(launch, answer, plan["capability"]["modes"])
    typed = [rows.get(name, 0) for name, flag in ROWS_OF_FLAGS if flag in flags]
    if flags.get("--disaggregation-mode") != "decode":  # also where the host captures none
        graph = int(flags.get("--cuda-graph-max-bs-prefill", 0))
        typed.append(-(-graph // plan["attn_tp_size"]))
    needed = max([HOST_TOKENS, *typed])
    return min(int(planned), -(-needed // multiple) * multiple)


def _untouched(launch: Launch, answer: Answer, ask: Ask) -> list[str]:
    stock = ask(without_plugin({**launch, "flags": {**launch["flags"]}}))
    if not stock["ok"]:
        return [f"left alone, but refused without us: {stock['error'][:200]}"]
    faults = []
    for part in ("resolved", "decode", "prefill"):
        if answer[part] != stock[part]:
            faults.append(f"left alone, but {part}: {answer[part]} not {stock[part]}")
    variables = {k: v for k, v in answer["environment"].items() if k.startswith(OURS)}
    if any(stock["environment"].get(name) != value for name, value in variables.items()):
        faults.append(f"left alone, but variables: {variables} not {stock['environment']}")
    return faults


def _fails_alone(launch: Launch, ask: Ask) -> list[str]:
    """What is left alone for want of memory starts on the stock host: rows of requests that come
    in apart, and of captured batches that it halves."""
    stock = ask(without_plugin(launch), built=True, layout=True, all_rows=True)
    if "oracle" in stock:
        served = STOCK_FAILS[0] in stock["oracle"]
        return [] if served else [f"left alone: {stock['oracle'][-1000:]}"]
    if not stock["ok"] or stock["built"]["error"]:
        return []
    halved = "--enable-two-batch-overlap" in launch["flags"]
    served = ("rows: decode ", "rows: prefill ", "rows: mixed ", *(("rows: ",) if halved else ()))
    why = [reason for reason in why_stock_fails(launch, stock) if not reason.startswith(served)]
    return [f"left alone, but {why}"] if why else []


def _refused_by_host(launch: Launch, answer: Answer, ask: Ask) -> list[str]:
    stock = ask(without_plugin(launch))
    if stock["ok"]:
        return [f"host: {answer['type']}: {answer['error'][:300]}, accepted without us"]
    return []


def _fixes(launch: Launch, answer: Answer, ask: Ask) -> list[str]:
    """All changes together are accepted, by us and by the host."""
    limits = [error["limit"] for error in answer["errors"]]
    changes = [change for error in answer["errors"] for change in error["changes"]]
    if not all(error["changes"] for error in answer["errors"]):
        return [] if "device memory" in limits else [f"fix: none for {limits}"]
    changed = apply(launch, changes)
    fixed = ask(changed)
    if fixed["ok"]:
        return []
    if fixed["errors"]:
        return [f"fix: {limits} {changes} then {fixed['error'][:400]}"]
    if not ask(without_plugin(changed))["ok"]:
        return []  # what the host refuses in any case
    return [f"fix: {limits} {changes} refused by the host: {fixed['error'][:300]}"]


def _refused_under_auto(launch: Launch, answer: Answer, ask: Ask) -> list[str]:
    """The stock host fails as well: refused, or later for one of these reasons."""
    stock = ask(without_plugin(launch), built=True, layout=True, all_rows=True)
    if "oracle" in stock:
        expected = any(text in stock["oracle"] for text in STOCK_FAILS)
        return [] if expected else [f"oracle: {stock['oracle'][-1000:]}"]
    if not stock["ok"] or stock["built"]["error"]:
        return []
    if why_stock_fails(launch, stock):
        return []
    limits = [(error["limit"], error["got"][:160]) for error in answer["errors"]]
    return [f"auto: refused for {limits}, which the stock host runs"]


def why_stock_fails(launch: Launch, stock: Answer) -> list[str]:
    """Reasons why the stock host fails after it has accepted the launch."""
    flags, env, built = launch["flags"], launch["env"], stock["built"]
    backend = stock["resolved"]["moe_a2a_backend"]
    if backend not in BUILT_IN:
        return []
    why = []
    tokens, ranks = int(env.get(tokens_variable(backend), HOST_TOKENS)), int(flags["--tp-size"])
    for layer in built["layers"]:
        for rows, taken in layer["takes"].items():
            if taken.startswith("fails"):
                why.append(f"experts: {rows} {taken}")
        # ``FusedMoEWithLoRA`` wants what no method but Triton's has of the layer, and no function
        # takes Triton rows of a dispatch.
        if adapts_experts(launch) and layer["runner"] in (None, "deep_gemm", "triton"):
            why.append("LoRA on the experts")
        # DeepGEMM takes FP8 rows with their scales for all but bf16 weights; the methods of other
        # runners say themselves in which rows they are dispatched.
        bf16 = layer["method"] == "UnquantizedFusedMoEMethod"
        if layer["runner"] == "deep_gemm" and not bf16 and layer["rows"] != "fp8":
            why.append(f"rows in {layer['rows']}")
        # What no registry tells: NVFP4's method has no branch for it.
        if layer["method"] == "ModelOptNvFp4FusedMoEMethod" and layer["runner"] == "humming":
            why.append("NVFP4 on humming")
        # What no registry tells: DeepGEMM's FP4 kernels are Blackwell's, and the model raises in
        # its first forward.
        if "fp4-experts" in launch["model"] and launch["device"] != "b200":
            why.append("FP4 experts on DeepGEMM")
        if launch["model"].startswith("gpt-oss"):
            why.append("a model without a DeepEP forward")
        if "cutlass_w4afp8" in layer["takes"].values() and typed_rows(launch):
            why.append("rows that one of W4AFP8's kernels does not take")
        if layer["rows"] == "fp8" and tokens * ranks % 128 and backend == "deepep":
            why.append("scales of FP8 rows past the end of their tensor")
    prefill = stock["prefill"]
    if prefill["backend"] != "disabled" and not prefill["bs"]:
        why.append("no prefill batch to capture")
    layout = stock["layout"]
    if not layout["builds"]:
        why.append("mode auto")
    modes = [mode for mode, batched in layout["batched"].items() if batched]
    for name, value in bounded_rows(launch, stock, modes).items():
        if value > tokens:
            why.append(f"rows: {name} {value} > {tokens}")
    experts = max((layer["experts"] for layer in built["layers"]), default=0)
    if backend in ("deepep", "nixl"):
        if ranks > 7 and ranks % 8:
            why.append("ranks")
        if tokens > 1024 or ranks * tokens % 4:
            why.append("T")
        if flags.get("--dtype") == "float16":
            why.append("dtype")
    if experts % ranks:
        why.append("experts")
    if "--ep-num-redundant-experts" in flags and launch["model"].startswith("glm-4.5"):
        why.append("redundant experts that its layers do not hold")
    size, taken = (getattr(BUILT_IN[backend].limits, n) for n in ("buffer_bytes", "device_bytes"))
    usable = built["device"] - 2**31
    fraction = stock["resolved"]["mem_fraction_static"]
    if size and modes:
        hidden = built["hidden"]
        buffer = size(tokens, hidden, ranks, experts)
        combined = 2 * experts * tokens * hidden
        held = combined + (taken(buffer) if taken else buffer)
        if buffer >= 16 * (2**31 - 1) or held > usable * (1 - fraction):
            why.append("buffer")
        if backend == "deepep" and hidden not in HIDDEN_SIZES:
            why.append("hidden")
    if built["weights"] > usable * fraction - 2**28:
        why.append("weights")
    return why


def adapts_experts(launch: Launch) -> bool:
    """Whether adapters of both projections of the experts are served."""
    modules = launch["flags"].get("--lora-target-modules", "")
    return modules == "all" or {"gate_up_proj", "down_proj"} <= set(modules.split())


def typed_rows(launch: Launch) -> bool:
    """Whether the user named a dtype for all dispatches."""
    asked = launch["flags"].get("--deepep-dispatcher-output-dtype", "auto")
    return asked != "auto" or "SGLANG_DEEPEP_BF16_DISPATCH" in launch["env"]
