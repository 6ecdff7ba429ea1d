"""Whose experts compute a launch's low-latency rows, or what to change so that some do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from .facts import LaunchFacts, ModelFacts, fused_flags
from .host_models import PLAIN_EXPERTS
from .leaving import LOW_LATENCY, leave
from .plan import Change, Rejection
from .weight_formats import FORMATS, HostExperts

Runner = Literal["moe_plugin", "host"]
JIT_DEEP_GEMM = "SGLANG_ENABLE_JIT_DEEPGEMM"
BF16_ROWS = "SGLANG_DEEPEP_BF16_DISPATCH"
EXPERTS = "experts for the batched layout"
_OTHERS = ("gelu", "relu")
"""Activations that are not SwiGLU by another name."""


def dispatches_fp8(model: ModelFacts, launch: LaunchFacts) -> bool:
    """Whether DeepEP carries low-latency rows in FP8 here: as asked, else as the experts take
    them."""
    if launch.transport != "deepep":
        return False
    if launch.dispatch_dtype != "auto":
        return launch.dispatch_dtype == "fp8"
    if _own_problem(model, launch) == "":
        own = FORMATS[model.weight_format].own
        return own is not None and own.rows == "fp8"
    host = host_of(model, launch)
    return host is None or host.rows[0] == "fp8"


def host_of(model: ModelFacts, launch: LaunchFacts) -> HostExperts | None:
    """The host's experts that this runner backend leads to."""
    known = FORMATS.get(model.weight_format)
    return known.host.get(launch.moe_runner_backend, known.any_runner) if known else None


def _own_problem(model: ModelFacts, launch: LaunchFacts) -> str:
    """Why the plugin's experts do not compute low-latency rows here; empty where they do."""
    known, capability = FORMATS.get(model.weight_format), launch.compute_capability
    own = known.own if known else None
    if launch.moe_runner_backend != "auto":
        return f"--moe-runner-backend {launch.moe_runner_backend}"
    if own is None:
        return f"they do not read {model.weight_format} weights"
    if model.hidden_act not in own.activations:
        return f"they do not compute {model.hidden_act}"
    if own.below is not None and capability is not None and capability >= own.below:
        return f"the host stores {model.weight_format} weights in DeepGEMM's layout here"
    if model.classes & PLAIN_EXPERTS:
        return f"{model.architecture} builds its experts outside the all-to-all's class"
    if launch.single_batch_overlap or fused_flags(model, launch):
        return "the host's overlap and fused shared experts come with the host's experts"
    return ""


def host_problem(model: ModelFacts, launch: LaunchFacts, *, normal: bool) -> str:
    """Why the host's experts fail here; empty where they run."""
    asked, weights = launch.moe_runner_backend, model.weight_format
    host = host_of(model, launch)
    if host is None:
        became = asked if launch.runner_typed or asked == "auto" else f"{asked}, its own choice"
        return f"the host's {became} computes no {weights} weights on low-latency rows"
    act, _, mark = model.hidden_act.partition(", ")
    capability = launch.compute_capability
    wanted = launch.dispatch_dtype in ("auto", *host.rows)  # or the rows are refused as such
    if launch.layers_by_runner and wanted and not host.runner:
        return f"{BF16_ROWS} takes {weights} layers away from their kernel, whatever the backend"
    if host.runner and host.runner not in launch.host_runners:
        return f"this SGLang registers no functions of {host.runner} for low-latency rows"
    if mark in host.leaves_out:
        what = "clamp" if mark == "clamped" else "limit"
        return f"{_name(host)} leaves the {what} of {model.architecture or 'the activation'} out"
    if act.startswith(_OTHERS) and act not in host.activations:
        return f"{_name(host)} computes {' or '.join(sorted(host.activations))}, not {act}"
    if host.least and capability is not None and capability < host.least:
        needs = dotted(host.least)
        return f"{_name(host)} needs compute capability {needs} for {weights}, " + _this(capability)
    if host.deep_gemm and capability is not None and capability < (9, 0):
        return f"DeepGEMM needs compute capability 9.0, {_this(capability)}"
    if host.deep_gemm and launch.deep_gemm_switched_off:
        return f"{JIT_DEEP_GEMM} switches DeepGEMM off"
    if host.deep_gemm and not launch.has_deep_gemm:
        return "DeepGEMM is not installed"
    if normal and not host.normal_rows:
        return f"{_name(host)} has no experts for normal dispatch, which prefill uses"
    return ""


def _name(host: HostExperts) -> str:
    return {"deep_gemm": "DeepGEMM", "": "the host's kernel"}.get(host.runner, host.runner)


def dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _this(capability: tuple[int, int]) -> str:
    return f"this device has {dotted(capability)}"


def choose_experts(
    model: ModelFacts, launch: LaunchFacts, *, normal: bool
) -> tuple[Runner, list[Rejection]]:
    """Whose experts, given that prefill also runs DeepEP's normal mode (``normal``) or not."""
    if not normal and not _own_problem(model, launch):
        own = FORMATS[model.weight_format].own
        assert own is not None
        return "moe_plugin", asked_rows(model, launch, (own.rows,))
    foreign = launch.foreign_runner or model.weight_format not in FORMATS
    if foreign:
        return "host", [_unknown(model, launch)]
    problem = host_problem(model, launch, normal=normal)
    if problem:
        return "host", [_rejected(model, launch, problem, normal=normal)]
    host = host_of(model, launch)
    assert host is not None
    errors = asked_rows(model, launch, host.rows)
    if not errors and normal:
        errors = asked_rows(model, launch, host.normal_rows, " in normal dispatch")
    return "host", errors


def decodes_on_own(model: ModelFacts, launch: LaunchFacts) -> bool:
    """Whether low-latency rows go to the plugin's experts where the host's keep normal dispatch.

    Both read the same weights and rows then. A runner that was typed beside one that the host would
    choose itself is a wish, and is kept.
    """
    known, host = FORMATS.get(model.weight_format), host_of(model, launch)
    if known is None or known.own is None or host is None or host.runner != "deep_gemm":
        return False
    if known.own.rows not in host.normal_rows:  # nor the same weights: ours repack them
        return False
    if launch.moe_runner_backend != "auto" and "auto" in known.host:
        return False
    if launch.dispatch_dtype not in ("auto", known.own.rows):
        return False
    return not _own_problem(model, replace(launch, moe_runner_backend="auto"))


def _runs(model: ModelFacts, launch: LaunchFacts, *, normal: bool) -> bool:
    own = not normal and not _own_problem(model, launch)
    return own or not host_problem(model, launch, normal=normal)


def asked_rows(
    model: ModelFacts, launch: LaunchFacts, able: tuple[str, ...], where: str = ""
) -> list[Rejection]:
    """The dtype that the user asked for, against those that the experts multiply."""
    if launch.dispatch_dtype in ("auto", *able):
        return []
    source = launch.dispatch_dtype_source
    return [
        Rejection(
            "dtype of dispatched rows",
            got=f"{launch.dispatch_dtype} ({source}) with {model.weight_format} weights{where}",
            allowed=f"{' or '.join(able)}; auto selects {able[0]}",
            fix=f"{'remove' if source.startswith('--') else 'unset'} {source}",
            changes=((source, None),),
            kind="unsupported",
        )
    ]


def _unknown(model: ModelFacts, launch: LaunchFacts) -> Rejection:
    """Nothing here knows these experts: they may well run on the stock host."""
    what = f"--moe-runner-backend {launch.moe_runner_backend}, {model.weight_format} weights"
    allowed = "runners and formats that this version of moe_plugin knows"
    return leave(EXPERTS, what, allowed, host_runs=True)


def _rejected(model: ModelFacts, launch: LaunchFacts, problem: str, *, normal: bool) -> Rejection:
    """Neither side has experts: with the first change after which one of them has."""
    asked = launch.moe_runner_backend
    got = f"{model.weight_format} weights, {model.hidden_act}, --moe-runner-backend {asked}"
    if normal:
        got += f", --deepep-mode {launch.deepep_mode}"
    for changes, candidate in _ways_out(model, launch):
        still_normal = normal and candidate.deepep_mode != "low_latency"
        if not _runs(model, candidate, normal=still_normal):
            continue
        limit = EXPERTS
        if changes == LOW_LATENCY:
            limit = "experts for prefill"
        elif asked != "auto" and launch.runner_typed:
            limit = "MoE runner"
        fix = ", ".join(
            f"unset {name}" if value is None else f"{name} {value}" for name, value in changes
        )
        return Rejection(limit, got, problem, fix + _aside(model), changes, "unsupported")
    return leave(EXPERTS, got, f"experts that run here ({problem})")


def _ways_out(
    model: ModelFacts, launch: LaunchFacts
) -> Iterator[tuple[tuple[Change, ...], LaunchFacts]]:
    """Changes that may find experts, the smallest first, and the launch after each."""
    if model.classes & PLAIN_EXPERTS:
        return  # whatever the runner, nobody has tried it with an all-to-all
    known = FORMATS[model.weight_format]
    if launch.deepep_mode == "auto":
        if launch.moe_runner_backend == "auto" and "auto" not in known.host:
            deep_gemm = replace(launch, moe_runner_backend="deep_gemm", runner_typed=True)
            yield (("--moe-runner-backend", "deep_gemm"),), deep_gemm  # the mode stays
        yield LOW_LATENCY, replace(launch, deepep_mode="low_latency")
    if launch.deep_gemm_switched_off:
        yield ((JIT_DEEP_GEMM, None),), replace(launch, deep_gemm_switched_off=False)
    if launch.layers_by_runner:
        yield ((BF16_ROWS, None),), without_bf16_rows(launch)
    # Where `auto` is overridden by the host itself, it is no way out.
    names = ["auto"] if launch.runner_typed else []
    for name in [*names, *(name for name in known.host if name != "auto")]:
        if name == launch.moe_runner_backend:
            continue
        changes: tuple[Change, ...] = (("--moe-runner-backend", name),)
        changes += known.with_runner if name != "auto" else ()
        other = replace(launch, moe_runner_backend=name, runner_typed=True)
        yield changes, other
        if launch.deepep_mode == "auto":
            yield changes + LOW_LATENCY, replace(other, deepep_mode="low_latency")


def without_bf16_rows(launch: LaunchFacts) -> LaunchFacts:
    """The launch with :data:`BF16_ROWS` unset: a dtype that something else names stays."""
    named = launch.dispatch_dtype_source != BF16_ROWS
    dtype = launch.dispatch_dtype if named else "auto"
    return replace(launch, layers_by_runner=False, dispatch_dtype=dtype)


def _aside(model: ModelFacts) -> str:
    if model.weight_format == "fp8_fp4" and model.architecture.startswith("DeepseekV4"):
        return ", or the FP8 checkpoint with SGLANG_DSV4_FP4_EXPERTS=0"
    return ""
