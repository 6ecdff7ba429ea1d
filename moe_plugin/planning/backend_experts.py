"""Whose experts run behind the backends other than DeepEP, and with which rows."""

from __future__ import annotations

from dataclasses import replace

from ..batched_backend import BatchedBackend
from .expert_choice import EXPERTS, Runner, asked_rows, host_of, host_problem
from .facts import LaunchFacts, ModelFacts
from .leaving import use_deepep
from .plan import Rejection
from .weight_formats import FORMATS


def host_experts(
    model: ModelFacts, launch: LaunchFacts, backend: BatchedBackend
) -> list[Rejection]:
    """What keeps the host's DeepGEMM from running behind ``backend``, its only runner there."""
    errors = _pplx_topology(launch) if backend.name == "pplx" else []
    if launch.moe_runner_backend not in ("auto", "deep_gemm"):
        errors.append(
            Rejection(
                "MoE runner",
                got=f"--moe-runner-backend {launch.moe_runner_backend}",
                allowed=f"auto or deep_gemm with --moe-a2a-backend {backend.name}",
                fix="--moe-runner-backend auto",
                changes=(("--moe-runner-backend", "auto"),),
                kind="unsupported",
            )
        )
    launch = replace(launch, moe_runner_backend="deep_gemm", runner_typed=False)
    if model.weight_format not in backend.host_formats:
        allowed = f"{sorted(backend.host_formats)} over {backend.limits.name}"
        # DeepEP v2 refuses them when it builds its layers; pplx-kernels may carry them.
        maybe = backend.name == "pplx"
        return [*errors, use_deepep("expert weights", model.weight_format, allowed, maybe)]
    if problem := host_problem(model, launch, normal=False):
        got = f"{model.weight_format} weights over {backend.limits.name}"
        return [*errors, use_deepep(EXPERTS, got, f"experts that run here ({problem})")]
    host = host_of(model, launch)
    return errors + (asked_rows(model, launch, host.rows) if host else [])


def _pplx_topology(launch: LaunchFacts) -> list[Rejection]:
    errors = []
    if launch.attn_dp_size < 2:
        got = f"--attn-dp-size {launch.attn_dp_size}"
        allowed = ">= 2: pplx-kernels sends between groups"
        if launch.tp_size < 2:
            errors.append(use_deepep("attention-DP groups", got, allowed))
        else:
            change = ("--attn-dp-size", str(launch.tp_size))
            fix = " ".join(change)
            errors.append(Rejection("attention-DP groups", got, allowed, fix, (change,), "config"))
    if launch.pp_size > 1:
        got = f"--pp-size {launch.pp_size}"
        allowed = "1: the all-to-all of pplx-kernels spans the whole world"
        change = ("--pp-size", "1")
        errors.append(
            Rejection("pipeline stages", got, allowed, "--pp-size 1", (change,), "config")
        )
    return errors


def rows_for_experts(
    model: ModelFacts, launch: LaunchFacts, backend: BatchedBackend, runner: Runner
) -> list[Rejection]:
    """Rows that come in one dtype for all layers, against what the experts read."""
    variable = backend.bf16_variable
    if variable == "":
        return []  # each layer asks for what it reads
    asked = launch.moe_runner_backend
    if runner == "host" and model.weight_format == "unquantized":
        return [
            Rejection(
                "MoE runner",
                got=f"--moe-runner-backend {asked} with unquantized weights over {backend.name}",
                allowed="auto: the host runs its own bf16 experts behind deepep and pplx alone",
                fix="--moe-runner-backend auto",
                changes=(("--moe-runner-backend", "auto"),),
                kind="unsupported",
            )
        ]
    if "bf16" not in _read_instead_of_fp8(model, launch, runner):
        return []
    if variable is None:
        got = f"FP8, always, with {model.weight_format} weights, --moe-runner-backend {asked}"
        return [use_deepep(f"dtype of rows over {backend.name}", got, "bf16 for these experts")]
    if runner == "moe_plugin" or launch.dispatch_dtype == "bf16":
        return []  # for ours the variable is exported
    return [
        Rejection(
            f"dtype of rows over {backend.name}",
            got=f"FP8 with --moe-runner-backend {asked}",
            allowed="bf16, which that runner quantises by itself",
            fix=f"{variable}=1",
            changes=((variable, "1"),),
            kind="unsupported",
        )
    ]


def _read_instead_of_fp8(model: ModelFacts, launch: LaunchFacts, runner: Runner) -> tuple[str, ...]:
    """Dtypes of rows that the chosen experts read if they do not read FP8; else nothing."""
    rows: tuple[str, ...]
    if runner == "moe_plugin":
        own = FORMATS[model.weight_format].own
        rows = (own.rows,) if own else ()
    else:
        host = host_of(model, launch)
        rows = host.rows if host else ()
        if host and host.runner == "humming":
            rows = ("bf16",)  # it takes FP8 from DeepEP alone (configure_humming_deepep_dispatch)
    return () if "fp8" in rows else rows
