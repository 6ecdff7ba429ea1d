"""``--use-batched-dp-moe on`` selects a batched backend where the user chose none."""

from __future__ import annotations

from typing import Any

from ...capability import backend_names
from ...planning.plan import Rejection, refusal
from ..flags import requested


def select_backend(server_args: Any, cfg: Any) -> tuple[str, str, dict[str, str]]:
    """(backend, mode, what ``on`` has to declare). Contradictions raise."""
    backend, mode = cfg.moe_a2a_backend, cfg.deepep_mode
    if requested(server_args).switch != "on":
        return backend, mode, {}
    _refuse_rivals(cfg)
    chosen = {}
    # The host cannot tell its defaults `none` and `auto` from a choice: both count as unset.
    if backend == "none":
        backend = chosen["moe_a2a_backend"] = "deepep"
    if backend not in backend_names():
        raise refusal(
            [
                Rejection(
                    "all-to-all backend",
                    got=f"--use-batched-dp-moe on with --moe-a2a-backend {backend}",
                    allowed=f"one of {backend_names()}",
                    fix="--moe-a2a-backend deepep, or --use-batched-dp-moe off",
                    changes=(("--moe-a2a-backend", "deepep"),),
                    kind="config",
                )
            ]
        )
    if backend == "deepep" and mode == "normal":
        raise refusal(
            [
                Rejection(
                    "deepep mode",
                    got="--use-batched-dp-moe on with --deepep-mode normal",
                    allowed="low_latency: normal mode has no batched layout",
                    fix="--deepep-mode low_latency, or --use-batched-dp-moe off",
                    changes=(("--deepep-mode", "low_latency"),),
                    kind="config",
                )
            ]
        )
    if backend == "deepep" and mode == "auto":
        mode = chosen["deepep_mode"] = "low_latency"
    return backend, mode, chosen


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
