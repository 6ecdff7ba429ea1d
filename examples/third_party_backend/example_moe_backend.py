"""A batched all-to-all of somebody else's, as data: when it is batched, and what it can carry.

It is called ``mori`` here, one of the names that SGLang takes for ``--moe-a2a-backend``. The limits
are made up. Whoever registers a backend also brings what moves the tokens.
"""

from __future__ import annotations

from moe_plugin import BatchedBackend, CapabilityFacts, Limits, Mode


def batched_modes(facts: CapabilityFacts) -> frozenset[Mode]:
    """Forward modes in which experts get ``[local_experts, ranks * T, hidden]`` from it: all."""
    del facts  # such as the role of the instance, or --deepep-mode where that steers the backend
    return frozenset(Mode)


def buffer_bytes(tokens: int, hidden: int, ranks: int, experts: int) -> int:
    """What one rank allocates for T tokens: bf16 rows, both ways."""
    del ranks
    return 2 * 2 * tokens * hidden * experts


def backend() -> BatchedBackend:
    """What the entry point names."""
    return BatchedBackend(
        name="mori",
        batched_modes=batched_modes,
        explicit_flag="--moe-a2a-backend mori",
        limits=Limits(
            name="the example's all-to-all",
            default_max_tokens=128,  # where nothing is typed
            max_tokens=512,
            hidden_sizes=frozenset({2048, 7168}),
            buffer_bytes=buffer_bytes,
            sources=(("max_tokens", "made up for this example"),),
        ),
    )
