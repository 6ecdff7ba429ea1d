"""The last step: hold what resolution arrived at against the plan, and refuse what broke it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...batched_backend import Capability
from ...capability import get_backend
from ...planning.compatibility import LEAVE, LEAVE_TEXT
from ...planning.plan import Change, Plan, Rejection, refusal
from ...planning.row_budgets import ceil_div, ceil_to, prefill_tokens_per_group, requests_per_group
from ..flags import requested
from .draft_facts import draft_width
from .launch_facts import attn_dp_size, explicit_graph_max
from .launch_plan import plan_for
from .reservation import carried


@dataclass(frozen=True, slots=True)
class Final:
    """Final values of one launch, per attention-DP group where the host counts that way."""

    chunk: int
    prefill_graph: int
    decode_graph: int
    running: int | None


def final_values(cfg: Any) -> Final:
    """Read the resolved budgets. 0 stands for graphs that are not captured."""
    config = cfg.cuda_graph_config
    sizes = {"prefill": 0, "decode": 0}
    for phase in sizes:
        found = getattr(config, phase, None)
        if cfg.device != "cpu" and found is not None and found.backend != "disabled":
            sizes[phase] = max([*(found.bs or ()), found.max_bs or 0])
    return Final(
        cfg.chunked_prefill_size, sizes["prefill"], sizes["decode"], cfg.max_running_requests
    )


def verify(server_args: Any, planned: Plan | None) -> Plan | None:
    """The final plan. Raises one error naming everything that no longer holds."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    cfg = resolving_view(server_args)
    plan = plan_for(
        server_args, cfg, cfg.moe_a2a_backend, cfg.deepep_mode, late=True, planned=planned
    )
    capability = plan.capability
    before = planned.capability if planned else Capability(False, "")
    if capability.ok and capability.modes != before.modes:
        raise refusal([_flipped(cfg, capability)])
    if not capability.ok:
        if planned is not None and requested(server_args).switch == "on":
            raise refusal([_left(cfg, capability)])
        return None
    _refill(server_args, plan, cfg)
    errors = (*plan.errors, *check_final(plan, server_args, cfg))
    if errors:
        raise refusal(errors, plan)
    return carried(plan, planned)


def _refill(server_args: Any, plan: Plan, cfg: Any) -> None:
    """Lower what *we* filled where facts that came later ask for less: page size, draft width."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    lower: dict[str, Any] = {}
    chunk = plan.chunked_prefill_size // attn_dp_size(cfg)
    filled = plan.bounds_prefill and server_args.chunked_prefill_size is None
    if filled and 0 < chunk < cfg.chunked_prefill_size:
        lower["chunked_prefill_size"] = chunk
    if plan.bounds_decode and plan.max_running_requests:
        running = cfg.max_running_requests
        if server_args.max_running_requests is None and (running or 0) > plan.max_running_requests:
            lower["max_running_requests"] = plan.max_running_requests
        config = cfg.cuda_graph_config
        most = plan.cuda_graph_max_bs_decode
        ours = explicit_graph_max(server_args, "decode") is None
        if most and ours and config is not None and (config.decode.max_bs or 0) > most:
            sizes = sorted({*(size for size in config.decode.bs or () if size <= most), most})
            from sglang.srt.model_executor.cuda_graph_config import Phase, with_phase

            lower["cuda_graph_config"] = with_phase(config, Phase.DECODE, max_bs=most, bs=sizes)
    if lower:
        declare_resolution(server_args, "moe_plugin", **lower)


def _flipped(cfg: Any, capability: Capability) -> Rejection:
    flag = get_backend(capability.backend).explicit_flag
    mode = cfg.deepep_mode if capability.backend == "deepep" else None
    if mode is not None:
        flag = f"--moe-a2a-backend {cfg.moe_a2a_backend} --deepep-mode {mode}"
    changes: list[Change] = [("--moe-a2a-backend", cfg.moe_a2a_backend)]
    if mode is not None:
        changes.append(("--deepep-mode", mode))
    return Rejection(
        "all-to-all backend",
        got=f"the host selected {cfg.moe_a2a_backend} ({cfg.deepep_mode}) by itself, after "
        "budgets and memory were decided",
        allowed="an explicit choice",
        fix=flag,
        changes=tuple(changes),
        kind="config",
    )


def _left(cfg: Any, capability: Capability) -> Rejection:
    return Rejection(
        "all-to-all backend",
        got=f"--use-batched-dp-moe on, but the host resolved --moe-a2a-backend "
        f"{cfg.moe_a2a_backend}: {capability.reason}",
        allowed="a batched backend",
        fix="--use-batched-dp-moe auto",
        changes=(("--use-batched-dp-moe", "auto"),),
        kind="config",
    )


def check_final(plan: Plan, server_args: Any, cfg: Any) -> list[Rejection]:
    """Rows per rank of the *resolved* values: some were rounded or replaced by the host."""
    tokens, scatter = plan.max_dispatch_tokens_per_rank, plan.attn_tp_size
    final = final_values(cfg)
    errors = []

    def check(flag: str, got: str, rows: int, fits: int) -> None:
        if rows > tokens:
            errors.append(
                Rejection(
                    "rows per rank and forward",
                    got=f"{got} = {rows} rows per rank, as the host resolved it",
                    allowed=f"<= {tokens} (tokens per rank)",
                    fix=f"{flag} {fits}",
                    changes=((flag, str(fits)),),
                )
            )

    if plan.bounds_prefill and cfg.disaggregation_mode != "decode":
        chunk = final.chunk
        most = tokens * scatter * attn_dp_size(cfg)
        raw = server_args.chunked_prefill_size
        if chunk <= 0 and (raw is None or raw > 0):
            got = "the host switched chunked prefill off (multi-item scoring, or this model)"
            allowed = f"chunks of at most {most} tokens"
            errors.append(Rejection("rows per rank and forward", got, allowed, LEAVE_TEXT, LEAVE))
        elif chunk <= 0:
            check("--chunked-prefill-size", "chunked prefill off", tokens + 1, most)
        rows = prefill_tokens_per_group(
            chunk,
            dynamic_chunking=bool(getattr(cfg, "enable_dynamic_chunking", False)),
            pp_size=cfg.pp_size,
            max_prefill_tokens=cfg.max_prefill_tokens,
        )
        check("--chunked-prefill-size", f"chunk {chunk}", ceil_div(rows, scatter), most)
        graph = final.prefill_graph
        check(
            "--cuda-graph-max-bs-prefill",
            f"prefill graph {graph}",
            ceil_div(graph, scatter),
            tokens * scatter // 8 * 8,
        )
    if plan.bounds_decode and cfg.disaggregation_mode != "prefill":
        width = draft_width(server_args, cfg)
        groups = attn_dp_size(cfg)
        fits = tokens * scatter // width
        if final.running is None:
            check("--max-running-requests", "max_running_requests unset", tokens + 1, fits * groups)
            return errors
        pool = requests_per_group(final.running, groups)
        got = f"{pool} requests per DP group x {width}"
        rows = ceil_div(pool * width, scatter)
        check("--max-running-requests", got, rows, fits * groups)
        graph = min(final.decode_graph, ceil_to(pool, scatter))
        got = f"decode graph {graph} x {width}"
        check("--cuda-graph-max-bs-decode", got, ceil_div(graph * width, scatter), fits)
    return errors
