"""Which layers are captured in the host's prefill graphs; the layer is a stand-in."""

from program_io import emit
from sglang.srt.layers.dp_attention import get_is_extend_in_batch, set_is_extend_in_batch
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
    enable_breakable_cuda_graph,
)
from sglang.srt.model_executor.runner_utils.prefill_graph import prefill_graph_scope

from moe_plugin.batched_backend import Capability, Mode
from moe_plugin.integration.serve import moe_layer, process
from moe_plugin.planning.plan import Plan


class Layer:
    """Says what the host's flag was when it ran."""

    def forward_impl(self, hidden_states, topk_output):
        return f"captured, extend {get_is_extend_in_batch()}"


def host(layer, hidden_states, topk_output):
    """The host's own forward."""
    return "the host's"


def forward(bounds_prefill=True, runner=True):
    """Our hook, under a plan."""
    modes = frozenset(Mode) if bounds_prefill else frozenset({Mode.DECODE})
    plan = Plan(capability=Capability(True, "", modes), runner="moe_plugin" if runner else "host")
    process.current_plan = lambda: plan
    return moe_layer.around_moe_forward(host, Layer(), None, None)


set_is_extend_in_batch(False)
found = {"outside": forward()}
with enable_breakable_cuda_graph():
    found["inside"] = forward()
    found["normal mode for prefill"] = forward(bounds_prefill=False)
    found["the host's experts"] = forward(runner=False)
with prefill_graph_scope(full_graph=True):
    found["inside one graph"] = forward()
found["extend afterwards"] = get_is_extend_in_batch()
emit(found)
