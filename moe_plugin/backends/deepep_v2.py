"""DeepEP v2: T bounds every dispatch; decode is a masked slab, prefill one row after another.

Both layouts are the host's DeepGEMM's alone. ``--deepep-mode`` does not concern it.
"""

from __future__ import annotations

from ..batched_backend import BatchedBackend, CapabilityFacts, Mode
from ..planning.limits import Limits


def _batched_modes(facts: CapabilityFacts) -> frozenset[Mode]:
    """``_validate_common`` of the host's dispatcher refuses more than T rows in any forward."""
    del facts
    return frozenset(Mode)


DEEPEP_V2 = BatchedBackend(
    name="deepep_v2",
    batched_modes=_batched_modes,
    explicit_flag="--moe-a2a-backend deepep_v2",
    limits=Limits(
        name="DeepEP v2",
        tokens_variable="SGLANG_DEEPEP_V2_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
        dtypes=frozenset({"bfloat16"}),
        sources=(
            ("max_tokens", "none; the host compares chunk, graphs and every dispatch with T"),
            ("buffer_bytes", "not counted: ElasticBuffer alone knows its size, about 2 GB"),
            ("host_formats", "_validate_deepep_v2_quant_method of the host"),
            ("dtypes", "the host's token_dispatcher/deepep_v2.py expects bf16 activations"),
        ),
    ),
    module="deep_ep",
    package="DeepEP v2",
    host_formats=frozenset({"unquantized", "fp8_block", "mxfp8"}),
    whole_graphs=True,
)
