"""Make a refusal complete: the fixes that it names, applied together, give a plan that is ok.

Fixing one value can bring the next limit to light (``--deepep-mode low_latency`` also bounds
prefill). Rather than refusing once per start, the planner applies its own fixes and goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .compatibility import FLASHINFER_TILE
from .expert_choice import BF16_ROWS, without_bf16_rows
from .facts import LaunchFacts, ModelFacts
from .leaving import LEAVE, LEAVE_TEXT
from .limits import Limits
from .plan import Change, Rejection

ROUNDS = 6
_INTEGERS = {
    "--batched-dp-moe-max-tokens": "max_tokens",
    "MOE_PLUGIN_MAX_TOKENS": "max_tokens",
    "--chunked-prefill-size": "chunked_prefill_size",
    "--max-running-requests": "max_running_requests",
    "--max-prefill-tokens": "max_prefill_tokens",
    "--cuda-graph-max-bs-decode": "cuda_graph_max_bs_decode",
    "--cuda-graph-max-bs-prefill": "cuda_graph_max_bs_prefill",
    "--ep-num-redundant-experts": "redundant_experts",
    "--page-size": "page_size",
    "--tp-size": "tp_size",
    "--attn-dp-size": "attn_dp_size",
    "--pp-size": "pp_size",
    "--moe-dp-size": "moe_dp_size",
}
_TEXTS = {
    "--deepep-mode": "deepep_mode",
    "--load-format": "load_format",
    "--moe-runner-backend": "moe_runner_backend",
    "--deepep-dispatcher-output-dtype": "dispatch_dtype",
    "SGLANG_NIXL_EP_BF16_DISPATCH": "dispatch_dtype",
}
_SWITCHES = {
    "--enable-single-batch-overlap": "single_batch_overlap",
    "--enable-lora": "lora",
    "--enable-waterfill": "waterfill",
    "--enforce-shared-experts-fusion": "fuses_experts",
    "--enable-eplb": "rebalances",
}
_GRAPHS_OFF = {
    "--disable-decode-cuda-graph": "decode_graphs",
    "--disable-prefill-cuda-graph": "prefill_graphs",
}
Replan = Callable[[ModelFacts, LaunchFacts, Limits], tuple[Rejection, ...]]


def complete(
    errors: tuple[Rejection, ...],
    model: ModelFacts,
    launch: LaunchFacts,
    limits: Limits,
    replan: Replan,
) -> tuple[Rejection, ...]:
    """``errors``, with what their fixes bring to light added, and fixes brought up to date."""
    found = _reconciled(list(errors))
    for _ in range(ROUNDS):
        changes = [change for error in found for change in error.changes]
        if not found or any(name == "--moe-a2a-backend" for name, _ in changes):
            break  # nothing to fix, or the fix is another backend, or none
        fixed_model, fixed_launch = applied(model, launch, limits, changes)
        more = replan(fixed_model, fixed_launch, limits)
        if not more:
            break
        before = found
        found = list(found)
        for error in more:
            _merge(found, error)
        found = _reconciled(found)
        if found == before:
            break
    return tuple(found)


def followed_by(
    errors: tuple[Rejection, ...], more: tuple[Rejection, ...]
) -> tuple[Rejection, ...]:
    """``errors``, with ``more`` that their fixes brought to light."""
    if any(set(LEAVE) <= set(error.changes) for error in more):
        return left_altogether(tuple(dict.fromkeys((*errors, *more))))
    found = list(errors)
    for error in more:
        _merge(found, error)
    return tuple(_reconciled(found))


def left_altogether(errors: tuple[Rejection, ...]) -> tuple[Rejection, ...]:
    """``errors``, with the one fix that is left: to run without."""
    return tuple(replace(error, fix=LEAVE_TEXT, changes=LEAVE, alternatives=()) for error in errors)


def _reconciled(found: list[Rejection]) -> list[Rejection]:
    """One value per flag: where two limits bind the same one, the value that satisfies both.

    Budgets only ever have to shrink; tokens per rank, redundant experts and ranks only to grow.
    """
    grows = (
        "--batched-dp-moe-max-tokens", "--ep-num-redundant-experts", "--tp-size", "--attn-dp-size",
    )  # fmt: skip
    best: dict[str, int] = {}
    for name, value in (change for error in found for change in error.changes):
        if name in _INTEGERS and value is not None:
            keep = max if name in grows else min
            best[name] = keep(best.get(name, int(value)), int(value))

    def settle(error: Rejection) -> Rejection:
        fix, changes = error.fix, []
        for name, value in error.changes:
            settled = str(best[name]) if name in best and value is not None else value
            fix = fix.replace(f"{name} {value}", f"{name} {settled}")
            changes.append((name, settled))
        return replace(error, fix=fix, changes=tuple(changes))

    return [settle(error) for error in found]


def _merge(found: list[Rejection], error: Rejection) -> None:
    """Add ``error``, or hand its fix to the rejection that already changes the same flags, or that
    knew none for the same limit."""
    names = [name for name, _ in error.changes]
    for index, known in enumerate(found):
        if known.limit == error.limit and not known.changes:
            found[index] = error if names else known
            return
        if names and [name for name, _ in known.changes] == names:
            found[index] = replace(
                known, fix=error.fix, changes=error.changes, alternatives=error.alternatives
            )
            return
    found.append(error)


def applied(
    model: ModelFacts, launch: LaunchFacts, limits: Limits, changes: list[Change]
) -> tuple[ModelFacts, LaunchFacts]:
    """The facts of the launch after ``changes``; what facts do not hold is left alone."""
    values: dict[str, Any] = {}
    for name, value in changes:
        if name in _INTEGERS:
            values[_INTEGERS[name]] = None if value is None else int(value)
            if _INTEGERS[name] == "max_tokens":
                values["max_tokens_source"] = name
            if name == "--chunked-prefill-size":
                values["dp_group_chunk"] = None  # what the host made of the old one
        elif name in _TEXTS:
            values[_TEXTS[name]] = value or "auto"
            if name == "--moe-runner-backend":
                values["runner_typed"] = True
        elif name == BF16_ROWS and value is None:
            launch = without_bf16_rows(launch)
        elif name in _SWITCHES:
            values[_SWITCHES[name]] = value is not None
        elif name in _GRAPHS_OFF:
            values[_GRAPHS_OFF[name]] = value is None
        elif name == "SGLANG_ENABLE_JIT_DEEPGEMM":
            values["deep_gemm_switched_off"] = value in ("0", "false")
        elif name == limits.tokens_variable:
            values["host_tokens_per_rank"] = None if value is None else int(value)
        elif name == "--speculative-moe-a2a-backend":
            values |= {"draft_a2a_backend": value, "draft_shape": None}
        elif name == "--mem-fraction-static" and launch.memory is not None:
            fraction = None if value is None else float(value)
            launch = replace(launch, memory=replace(launch.memory, fraction=fraction))
        elif name == FLASHINFER_TILE and value:
            values["chunk_alignment"] = int(value)
        elif name == "--weight-cache-mode":
            values["weight_cache"] = value not in (None, "off")
        elif name == "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP":
            values["pipeline_warmup"] = value is not None
        elif name == "--dtype" and value:
            model = replace(model, dtype=value)
    return model, replace(launch, **values)
