"""The last step: hold what resolution arrived at against the plan, and refuse what broke it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...batched_backend import Capability
from ...capability import get_backend
from ...planning.leaving import leave
from ...planning.memory import gib
from ...planning.memory_use import recounted
from ...planning.plan import Change, Plan, Rejection, refusal
from ..flags import requested
from .fills import SOURCE
from .graph_facts import explicit_graph_max
from .launch_facts import attn_dp_size, launch_facts
from .launch_plan import plan_for
from .memory_facts import memory_facts
from .model_facts import model_facts
from .refusals import leave_alone
from .reservation import carried
from .resolved_rows import check_final


def verify(server_args: Any, planned: Plan | None) -> Plan | None:
    """The final plan. Raises one error naming everything that no longer holds.

    A batched backend that nobody foresaw is left alone under ``auto`` when nothing was planned:
    the launch is then the stock host's in every value. With a plan, budgets are filled, and the
    final values have to fit them.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view

    cfg = resolving_view(server_args)
    plan = plan_for(
        server_args, cfg, cfg.moe_a2a_backend, cfg.deepep_mode, late=True, planned=planned
    )
    capability = plan.capability
    if not capability.ok:
        if planned is not None and requested(server_args).switch == "on":
            raise refusal([_left(cfg, capability)])
        return None
    if planned is None:
        if requested(server_args).switch == "on":
            raise refusal([_flipped(cfg, capability)])
        leave_alone(server_args, [_flipped(cfg, capability).got])
        return None
    plan = _within(plan)
    _refill(server_args, plan, cfg)
    errors = (*plan.errors, *check_final(plan, server_args, cfg))
    if errors:
        raise refusal(errors, plan)
    plan = _with_final_cache(carried(plan, planned), server_args, cfg)
    if no_cache := without_cache(plan):
        raise refusal([no_cache], plan)
    return plan


def _with_final_cache(plan: Plan, server_args: Any, cfg: Any) -> Plan:
    """``plan`` in tokens of the KV cache's dtype, which models and attention backends decide
    after memory is."""
    if plan.memory is None:
        return plan
    model = model_facts(server_args)
    facts = memory_facts(server_args, cfg, model.dtype, late=True)
    launch = launch_facts(server_args, cfg, late=True)
    return replace(plan, memory=recounted(plan.memory, model, launch, facts))


def without_cache(plan: Plan) -> Rejection | None:
    """What the host keeps is known for certain once memory is sized, and may be more."""
    memory = plan.memory
    if memory is None or not memory.weights_source or memory.kv_cache_bytes > 0:
        return None
    kept = gib(int(memory.usable_bytes * (1 - memory.mem_fraction_static)))
    return leave(
        "device memory",
        f"{gib(memory.weights_bytes)} of weights, and {kept} kept back for what runs beside them: "
        f"{gib(-memory.kv_cache_bytes)} more than there is, before any KV cache",
        f"{gib(memory.usable_bytes)} of a device of {gib(memory.device_bytes)}",
    )


def _within(plan: Plan) -> Plan:
    """``plan``, on the host's experts where only they run what the host made of the launch."""
    errors = tuple(error for error in plan.errors if not error.host_runs)
    return plan if errors == plan.errors else replace(plan, errors=errors, runner="host")


def _refill(server_args: Any, plan: Plan, cfg: Any) -> None:
    """Lower what *we* filled where facts that came later ask for less: page size, draft width."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    lower: dict[str, Any] = {}
    chunk = plan.chunked_prefill_size // attn_dp_size(cfg)
    filled = plan.bounds_prefill and server_args.chunked_prefill_size is None
    if filled and 0 < chunk < cfg.chunked_prefill_size:
        lower["chunked_prefill_size"] = chunk
    if plan.bounds_decode and plan.max_running_requests:
        if (cfg.max_running_requests or 0) > plan.max_running_requests:
            lower["max_running_requests"] = plan.max_running_requests
        config = cfg.cuda_graph_config
        most = plan.cuda_graph_max_bs_decode
        ours = explicit_graph_max(server_args, "decode") is None
        if most and ours and config is not None and (config.decode.max_bs or 0) > most:
            sizes = sorted({*(size for size in config.decode.bs or () if size <= most), most})
            from sglang.srt.model_executor.cuda_graph_config import with_phase

            lower["cuda_graph_config"] = with_phase(config, "decode", max_bs=most, bs=sizes)
    if lower:
        declare_resolution(server_args, SOURCE, **lower)


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
