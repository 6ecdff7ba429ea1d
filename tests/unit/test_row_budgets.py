"""Rows per rank: the printed limits are real, for every budget of thousands of launches."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

from moe_plugin.backends.deepep import DEEPEP_LIMITS
from moe_plugin.batched_backend import Mode
from moe_plugin.planning.facts import LaunchFacts, ModelFacts
from moe_plugin.planning.plan import Plan
from moe_plugin.planning.planner import make_plan
from moe_plugin.planning.row_budgets import row_budgets

MODEL = ModelFacts(
    architecture="Qwen3MoeForCausalLM",
    hidden_size=2048,
    num_experts=192,
    top_k=8,
    moe_intermediate_size=768,
    context_length=40960,
    weight_format="fp8_block",  # its T moves in larger steps than bf16's
)
FIELDS = (
    "chunked_prefill_size",
    "max_prefill_tokens",
    "cuda_graph_max_bs_prefill",
    "cuda_graph_max_bs_decode",
    "max_running_requests",
)
EVERY = settings(
    max_examples=500,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@st.composite
def launch_facts(draw: st.DrawFn) -> LaunchFacts:
    """A launch with a typed T: without one, T follows what else is typed."""
    tp = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
    dp = draw(st.sampled_from([n for n in range(1, tp + 1) if tp % n == 0]))
    cp = draw(st.sampled_from([n for n in (1, 1, 2, 4) if (tp // dp) % n == 0]))

    def maybe(values: st.SearchStrategy[int]) -> int | None:
        return draw(st.one_of(st.none(), st.none(), values))

    return LaunchFacts(
        tp_size=tp,
        attn_dp_size=dp,
        attn_cp_size=cp,
        pp_size=draw(st.sampled_from([1, 1, 2])),
        deepep_mode=draw(st.sampled_from(["low_latency", "low_latency", "auto"])),
        disaggregation_mode=draw(st.sampled_from(["null", "null", "prefill", "decode"])),
        draft_width=draw(st.sampled_from([1, 1, 2, 3, 4, 7, 16])),
        two_batch_overlap=draw(st.sampled_from([False, False, True])),
        mixed_chunk=draw(st.booleans()),
        dynamic_chunking=draw(st.booleans()),
        max_prefill_tokens=draw(st.sampled_from([64, 256, 2048, 16384])),
        page_size=draw(st.sampled_from([1, 1, 16, 64, 100])),
        decode_graphs=draw(st.sampled_from([True, True, False])),
        prefill_graphs=draw(st.sampled_from([True, True, False])),
        max_tokens=128 * draw(st.integers(1, 8)),
        chunked_prefill_size=maybe(st.integers(1, 1024 * tp)),
        max_running_requests=maybe(st.integers(1, 1024 * tp)),
        cuda_graph_max_bs_prefill=maybe(st.integers(8, 1024 * tp)),
        cuda_graph_max_bs_decode=maybe(st.integers(1, 512 * tp)),
    )


def planned(launch: LaunchFacts) -> Plan:
    """Its plan on DeepEP."""
    return make_plan(MODEL, launch, DEEPEP_LIMITS)


def steps_of(launch: LaunchFacts, plan: Plan) -> dict[str, int]:
    """How far each value must move to be another row."""
    found = row_budgets(launch, plan.capability.modes, plan.max_dispatch_tokens_per_rank)
    return {budget.name: budget.step for budget in found}


@EVERY
@given(launch_facts())
def test_value_and_headroom_are_the_limit_and_a_step_more_is_refused(launch: LaunchFacts) -> None:
    """Typed, the limit is accepted with everything else as it was; a step more names its flag."""
    plan = planned(launch)
    assume(plan.verdict == "ok")
    steps = steps_of(launch, plan)
    for budget in plan.budgets:
        assert budget.headroom is None or budget.headroom >= 0, budget
        if budget.name not in FIELDS:
            continue
        assert budget.value == getattr(plan, budget.name, launch.max_prefill_tokens)
        if budget.headroom is None:
            event(f"{budget.name} has no limit")
            huge: Any = {budget.name: 1 << 20}
            assert planned(replace(launch, **huge)).verdict == "ok", budget
            continue
        assert budget.value is not None
        limit = budget.value + budget.headroom
        assert budget.limit.startswith(f"<= {limit} ("), budget
        typed: Any = {budget.name: limit}
        again = planned(replace(launch, **typed))
        assert again.verdict == "ok", (budget, again.errors)
        event(f"{budget.name} has a limit")
        typed = {budget.name: limit + steps[budget.name]}
        more = planned(replace(launch, **typed))
        assert more.verdict == "refused", budget
        named = {name for error in more.errors for name, _ in error.changes}
        flags = {budget.flag}
        if budget.name == "max_running_requests" and launch.cuda_graph_max_bs_decode:
            flags.add("--cuda-graph-max-bs-decode")  # a larger pool no longer clamps a typed graph
        assert named & flags


@EVERY
@given(launch_facts())
def test_no_forward_of_an_accepted_plan_overruns(launch: LaunchFacts) -> None:
    """Counted here by the definition, in fractions."""
    plan = planned(launch)
    assume(plan.verdict == "ok")
    tokens_per_rank, scatter = plan.max_dispatch_tokens_per_rank, launch.attn_tp_size
    if plan.bounds_prefill and launch.disaggregation_mode != "decode":
        chunk = plan.chunked_prefill_size // launch.attn_dp_size
        assert chunk > 0
        assert chunk <= tokens_per_rank * scatter
        if launch.dynamic_chunking and launch.pp_size > 1:
            assert max(ceil(1.25 * chunk), launch.max_prefill_tokens) <= tokens_per_rank * scatter
        assert ceil(plan.cuda_graph_max_bs_prefill / 8) * 8 <= tokens_per_rank * scatter
    if plan.bounds_decode and launch.disaggregation_mode != "prefill":
        requests = max(1, plan.max_running_requests // launch.attn_dp_size)
        assert requests * launch.draft_width <= tokens_per_rank * scatter
        alignment = launch.host_alignment
        pool = ceil(requests / alignment) * alignment
        width = 1 if launch.two_batch_overlap else launch.draft_width
        sizes = range(1, min(plan.cuda_graph_max_bs_decode, pool) + 1)
        captured = [size for size in sizes if size * width % alignment == 0]
        if launch.decode_graphs:
            assert captured
            assert max(captured) * launch.draft_width <= tokens_per_rank * scatter


@EVERY
@given(launch_facts())
def test_every_refusal_has_a_fix_that_is_accepted(launch: LaunchFacts) -> None:
    """Applied to the facts, all at once."""
    plan = planned(launch)
    assume(plan.verdict == "refused")
    names = {
        "--chunked-prefill-size": "chunked_prefill_size",
        "--max-running-requests": "max_running_requests",
        "--max-prefill-tokens": "max_prefill_tokens",
        "--cuda-graph-max-bs-decode": "cuda_graph_max_bs_decode",
        "--cuda-graph-max-bs-prefill": "cuda_graph_max_bs_prefill",
        "--batched-dp-moe-max-tokens": "max_tokens",
    }
    changes = [change for error in plan.errors for change in error.changes]
    values: Any = {names[flag]: int(value or 0) for flag, value in changes}
    assert planned(replace(launch, **values)).verdict == "ok", plan.errors


@EVERY
@given(launch_facts())
def test_a_cap_is_lowered_where_refusing_was_not_asked_for(launch: LaunchFacts) -> None:
    """Under ``auto`` a large cap of running requests costs a note and nothing else."""
    plan = planned(replace(launch, required=False))
    assume(plan.verdict == "ok" and plan.max_running_requests)
    capped = planned(replace(launch, required=False, max_running_requests=1 << 20))
    assert capped.verdict == "ok", capped.errors
    (budget,) = (b for b in capped.budgets if b.name == "max_running_requests")
    assert (budget.headroom, budget.source) == (0, "derived")
    assert [note for note in capped.notes if f"lowered to {budget.value}" in note]
    refused = planned(replace(launch, required=True, max_running_requests=1 << 20))
    assert refused.verdict == "refused"


def test_a_ceiling_does_not_ask_for_a_larger_t() -> None:
    """T follows requests that some T carries; a ceiling that none does leaves it alone."""
    launch = LaunchFacts(tp_size=8, attn_dp_size=8, required=False)
    asked = planned(replace(launch, max_running_requests=4096))
    assert (asked.max_dispatch_tokens_per_rank, asked.max_running_requests) == (512, 4096)
    ceiling = planned(replace(launch, max_running_requests=16384))
    assert (ceiling.max_dispatch_tokens_per_rank, ceiling.max_running_requests) == (256, 2048)
    assert Mode.DECODE in ceiling.capability.modes
