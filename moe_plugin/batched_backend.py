"""What a batched all-to-all backend is, and what it may look at to say in which modes it runs.

Types only, so that the built-in backends, the registry and the planner can all stand on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from .planning.limits import Limits


class Mode(Enum):
    """Forward modes that an all-to-all backend tells apart.

    EXTEND: prefill, chunked prefill, mixed chunks, draft extend.
    DECODE: decode, target verify and draft decode, which share the bounded row count.
    """

    EXTEND = "extend"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class CapabilityFacts:
    """All that the predicate may look at. Same on every rank and node by construction.

    Attributes:
        a2a_backend: the resolved ``--moe-a2a-backend``.
        deepep_mode: the resolved ``--deepep-mode`` (``auto``, ``normal``, ``low_latency``).
        disaggregation_mode: ``null``, ``prefill`` or ``decode``.
        has_routed_moe: the target model has a routed MoE layer.
        draft_has_routed_moe: the draft model has one.
        draft_a2a_backend: the draft's all-to-all backend; None follows the target's.
    """

    a2a_backend: str
    deepep_mode: str = "auto"
    disaggregation_mode: str = "null"
    has_routed_moe: bool = True
    draft_has_routed_moe: bool = False
    draft_a2a_backend: str | None = None

    def instance_modes(self) -> frozenset[Mode]:
        """Forward modes that this instance runs, given its disaggregation role."""
        if self.disaggregation_mode == "prefill":
            return frozenset({Mode.EXTEND})
        # A decode-only instance still extends: its warm-up, and requests it must recompute.
        return frozenset(Mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchedBackend:
    """One registered batched all-to-all backend.

    Attributes:
        name: the host's name for it (``--moe-a2a-backend NAME``).
        batched_modes: predicate; which of the instance's modes resolve to the batched layout.
        limits: what it can carry.
        explicit_flag: the flag that selects it explicitly, for messages.
        module: what the host imports for it, at top level; "" where it needs nothing.
        package: what to install for that module.
        low_latency_only: the host builds it in ``--deepep-mode low_latency`` alone.
        host_formats: expert weights that the host computes behind it, where only the host's
            DeepGEMM reads its output; empty where ours do.
        bf16_variable: the host's variable that makes every dispatch bf16; "" where each layer
            chooses for itself, None where rows are FP8 whatever the layer.
        whole_rows: the host holds the rows of a whole attention-DP group against T, although
            attention TP scatters them;
        whole_graphs: and here those of the largest decode graph only.
    """

    name: str
    batched_modes: Callable[[CapabilityFacts], frozenset[Mode]]
    limits: Limits
    explicit_flag: str = ""
    module: str = ""
    package: str = ""
    low_latency_only: bool = False
    host_formats: frozenset[str] = frozenset()
    bf16_variable: str | None = ""
    whole_rows: bool = False
    whole_graphs: bool = False


def unless_normal(facts: CapabilityFacts) -> frozenset[Mode]:
    """Modes of a backend that is low latency in every forward, or not built at all."""
    return frozenset() if facts.deepep_mode == "normal" else frozenset(Mode)


@dataclass(frozen=True, slots=True)
class Capability:
    """The answer: never a bare bool.

    Attributes:
        ok: the instance runs batched data-parallel MoE.
        reason: why, or why not, in one sentence.
        modes: forward modes whose rows are bounded; empty iff not ok.
        backend: the backend that answered, or "".
    """

    ok: bool
    reason: str
    modes: frozenset[Mode] = frozenset()
    backend: str = ""
