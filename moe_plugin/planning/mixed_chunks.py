"""Whether decoding requests ride along with prefill chunks by default (``--enable-mixed-chunk``).

Low latency makes prefill steps small and many. While one DP group prefills, its own requests would
wait for a step of their own and those of the other groups for the slower step; riding along, each
step serves both. On four H100s this made 1.09 times the tokens/s of own graphs alone over short
prompts, prompts of 1,000 and of 4,000 tokens, with inter-token latencies (p95) of 0.81 times
(benchmarks/results/2026-11-28-h100x4-serving-fp8.json).
"""

from __future__ import annotations

from .facts import LaunchFacts, ModelFacts
from .plan import Plan

ABLE = frozenset({"Glm4MoeForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"})
"""Architectures with plain grouped-query attention, whose prefill kernels read a decoding request's
context as cheaply as a prompt's. Latent attention expands that context in a prefill step."""
LEAST_TOKENS = 512
"""T below which half a chunk is too few running requests."""


def may_mix(model: ModelFacts, launch: LaunchFacts, plan: Plan) -> bool:
    """Whether the plan may let the host mix, where the user did not ask for it."""
    return (
        launch.may_mix_chunks
        and not (launch.mixed_chunk or launch.resolved)
        and plan.groups_apart
        and not plan.errors
        and plan.max_dispatch_tokens_per_rank >= LEAST_TOKENS
        and launch.prefill_graphs
        and launch.pp_size == 1  # the host captures no prefill graphs of several stages
        and launch.chunked_prefill_size is None
        and launch.disaggregation_mode == "null"
        and launch.draft_width == 1
        and not launch.two_batch_overlap
        and model.architecture in ABLE
    )
