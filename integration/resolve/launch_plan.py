"""Ask the capability and the planner about a launch: resolution, verification, the guard and
``moe-plugin plan`` all ask here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...backends.deepep import limits_of
from ...batched_backend import Capability, CapabilityFacts
from ...capability import backend_names, get_backend, use_batched_dp_moe
from ...planning.facts import LaunchFacts, ModelFacts
from ...planning.memory_use import states_room
from ...planning.plan import Plan
from ...planning.planner import make_plan
from .exported_variables import user_tokens_per_rank
from .installation import check_host
from .launch_facts import launch_facts, transport_of
from .memory_facts import memory_facts
from .model_facts import model_facts
from .state_facts import state_of_a_request


def capability_for(server_args: Any, cfg: Any, backend: str, mode: str) -> Capability:
    """The capability's answer for a backend and mode, on this model and launch."""
    return _answer(_facts(server_args, cfg, backend, mode), backend)


def _facts(
    server_args: Any, cfg: Any, backend: str, mode: str, *, late: bool = False
) -> tuple[ModelFacts, LaunchFacts] | None:
    """Model and launch; None where no backend of theirs is registered: then no model is worth a
    look, and its config may not even be readable here."""
    draft_backend = getattr(cfg, "speculative_moe_a2a_backend", None) or backend
    if not {backend, draft_backend} & set(backend_names()):
        return None
    launch = launch_facts(server_args, cfg, backend=backend, mode=mode, late=late)
    return model_facts(server_args), launch


def _answer(facts: tuple[ModelFacts, LaunchFacts] | None, backend: str) -> Capability:
    if facts is None:
        return use_batched_dp_moe(CapabilityFacts(a2a_backend=backend))
    model, launch = facts
    return use_batched_dp_moe(launch.capability_facts(model))


def plan_for(
    server_args: Any,
    cfg: Any,
    backend: str,
    mode: str,
    *,
    late: bool = False,
    planned: Plan | None = None,
) -> Plan:
    """Plan for a backend and mode with what the user set.

    Args:
        server_args: the raw record: what the user set.
        cfg: the host's live view of it.
        backend: the all-to-all backend to plan for.
        mode: the deepep mode to plan for.
        late: everything is resolved, so that the view's chunk is one DP group's.
        planned: what was planned before: memory is not asked twice.
    """
    facts = _facts(server_args, cfg, backend, mode, late=late)
    capability = _answer(facts, backend)
    if facts is None or not capability.ok:
        return Plan(capability=capability)
    limits = limits_of(get_backend(capability.backend), transport_of(cfg, capability.backend))
    model, launch = facts
    launch = replace(launch, host_tokens_per_rank=user_tokens_per_rank(limits))
    if planned is None:
        memory = memory_facts(server_args, cfg, model.dtype, late=late)
        launch = replace(launch, memory=memory)
    else:
        states = None
        if planned.memory is not None:  # the host may have given up its radix cache since
            state = state_of_a_request(server_args, cfg)
            states = states_room(planned.memory, launch, *state)
        if states is not None:
            states = min(states, planned.max_running_requests // launch.attn_dp_size or states)
        launch = replace(
            launch,
            default_tokens=planned.max_dispatch_tokens_per_rank,
            decode_graph_cap=planned.cuda_graph_max_bs_decode or None,
            running_cap=states,
        )
    plan = make_plan(model, launch, limits, capability)
    return check_host(plan, cfg)
