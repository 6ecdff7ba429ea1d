"""Our layers take part in the host's prefill graphs, no others do.

The graphs need a GPU; here the host's own flags around them are real, and the layer is a stand-in.
"""

from __future__ import annotations

from ..support.hosts import HOOKED, host_result

FORWARD = """
from sglang.srt.layers.dp_attention import get_is_extend_in_batch, set_is_extend_in_batch
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
    enable_breakable_cuda_graph,
)
from moe_plugin.batched_backend import Capability, Mode
from moe_plugin.integration.serve import buffer, moe_layer as layer
from moe_plugin.planning.plan import Plan

class Layer:
    def forward_impl(self, hidden_states, topk_output):
        return f"captured, extend {get_is_extend_in_batch()}"

def host(layer, hidden_states, topk_output):
    return "the host's"

def forward(bounds_prefill=True, runner=True):
    modes = frozenset(Mode) if bounds_prefill else frozenset({Mode.DECODE})
    plan = Plan(capability=Capability(True, "", modes), runner="moe_plugin" if runner else "host")
    buffer.current_plan = lambda: plan
    return layer.around_moe_forward(host, Layer(), None, None)

set_is_extend_in_batch(False)
found = {"outside": forward()}
with enable_breakable_cuda_graph():
    found["inside"] = forward()
    found["normal mode for prefill"] = forward(bounds_prefill=False)
    found["the host's experts"] = forward(runner=False)
found["extend afterwards"] = get_is_extend_in_batch()
emit(found)
"""


def test_the_layers_forward_is_hooked() -> None:
    assert "sglang.srt.layers.moe.ep_moe.layer.DeepEPMoE.forward" in host_result(HOOKED)


def test_only_our_low_latency_layers_are_captured() -> None:
    assert host_result(FORWARD) == {
        "outside": "the host's",
        "inside": "captured, extend True",
        "normal mode for prefill": "the host's",
        "the host's experts": "the host's",
        "extend afterwards": False,
    }
