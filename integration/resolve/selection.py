"""Which backend and mode: ``--use-batched-dp-moe on`` selects where the user chose none."""

from __future__ import annotations

from typing import Any

from ...backends.not_batched import NOT_BATCHED
from ...capability import backend_names
from ...planning.plan import Rejection, refusal
from ..flags import requested
from .launch_facts import backend_of


def select_backend(server_args: Any, cfg: Any) -> tuple[str, str, dict[str, str]]:
    """(backend, mode, what has to be declared now). Contradictions raise.

    Args:
        server_args: the raw record.
        cfg: the host's view of it as it will be: a backend that the host selects by itself later
            is declared now, before graphs and memory are decided.
    """
    backend, mode = cfg.moe_a2a_backend, cfg.deepep_mode
    chosen = {}
    # In mode `auto` the host raises when it builds these dispatchers.
    low_latency_only = backend_of(backend).low_latency_only
    if low_latency_only and mode == "auto":
        mode = chosen["deepep_mode"] = "low_latency"
    if requested(server_args).switch != "on":
        if backend in backend_names() and _now(server_args) != backend:
            chosen["moe_a2a_backend"] = backend
        return backend, mode, chosen
    _refuse_rivals(cfg)
    # The host cannot tell its defaults `none` and `auto` from a choice: both count as unset.
    if backend == "none":
        backend = "deepep"
    if backend not in backend_names():
        raise refusal([_other_backend(server_args, backend)])
    if mode == "normal" and (backend == "deepep" or low_latency_only):
        raise refusal([_normal_mode()])
    if _now(server_args) != backend:
        chosen["moe_a2a_backend"] = backend
    if backend == "deepep" and mode == "auto":
        mode = chosen["deepep_mode"] = "low_latency"
    return backend, mode, chosen


def _now(server_args: Any) -> str:
    from sglang.srt.arg_groups.model_override_base import resolving_view

    return str(resolving_view(server_args).moe_a2a_backend)


def _other_backend(server_args: Any, backend: str) -> Rejection:
    fix, changes = "--moe-a2a-backend deepep", [("--moe-a2a-backend", "deepep")]
    if server_args.moe_runner_backend in NOT_BATCHED:  # typed, it selects that backend
        fix += " --moe-runner-backend auto"
        changes.append(("--moe-runner-backend", "auto"))
    return Rejection(
        "all-to-all backend",
        got=f"--use-batched-dp-moe on with --moe-a2a-backend {backend}: "
        + NOT_BATCHED.get(backend, "not registered"),
        allowed=f"one of {backend_names()}",
        fix=f"{fix}, or --use-batched-dp-moe off",
        changes=tuple(changes),
        kind="config",
    )


def _normal_mode() -> Rejection:
    return Rejection(
        "deepep mode",
        got="--use-batched-dp-moe on with --deepep-mode normal",
        allowed="low_latency: normal mode has no batched layout",
        fix="--deepep-mode low_latency, or --use-batched-dp-moe off",
        changes=(("--deepep-mode", "low_latency"),),
        kind="config",
    )


def _refuse_rivals(cfg: Any) -> None:
    """Features that rule out an all-to-all: the host has looked for one before we select ours."""
    rivals = {
        "--enable-pd-role-switch": getattr(cfg, "enable_pd_role_switch", False),
        "--dwdp-size": getattr(cfg, "dwdp_size", 1) > 1,
    }
    errors = [
        Rejection(
            "all-to-all backend",
            got=f"--use-batched-dp-moe on with {flag}, which the host does not allow together "
            "with an all-to-all",
            allowed="one of both",
            fix=f"remove {flag}, or --use-batched-dp-moe off",
            changes=((flag, None),),
            kind="config",
        )
        for flag, given in rivals.items()
        if given
    ]
    if errors:
        raise refusal(errors)


def not_batched(reason: str, architecture: str) -> Rejection:
    return Rejection(
        "batched data-parallel MoE",
        got=f"--use-batched-dp-moe on, but {reason} ({architecture})",
        allowed="a model with routed MoE layers on a batched all-to-all backend",
        fix="--use-batched-dp-moe auto",
        changes=(("--use-batched-dp-moe", "auto"),),
        kind="unsupported",
    )
