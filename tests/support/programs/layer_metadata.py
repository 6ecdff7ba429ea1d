"""Rows of every rank, from what the host says of the tokens of the DP groups."""

from program_io import emit
from sglang.srt.layers import dp_attention

from moe_plugin.batched_backend import Capability
from moe_plugin.integration.serve import process
from moe_plugin.planning.plan import Plan


def sizes(tokens, **plan):
    """Rows by rank, or None."""
    dp_attention.get_dp_global_num_tokens = lambda: tokens
    process.current_plan = lambda: Plan(capability=Capability(True, ""), **plan)
    metadata = process.current_metadata()
    return metadata and metadata.sp_local_sizes


emit(
    [
        sizes([5, 2], ep_size=4, attn_tp_size=2),
        sizes([5], ep_size=4, attn_tp_size=2),
        sizes([7], ep_size=4, attn_tp_size=4),
        sizes(None, ep_size=4, attn_tp_size=4),
    ]
)
