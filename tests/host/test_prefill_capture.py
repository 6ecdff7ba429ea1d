"""Our layers take part in the host's prefill graphs, no others do.

The graphs need a GPU; here the host's own flags around them are real, and the layer is a stand-in.
"""

from __future__ import annotations

from ..support.hosts import HOOKED, host_result, program


def test_the_layers_forward_is_hooked() -> None:
    assert "sglang.srt.layers.moe.ep_moe.layer.DeepEPMoE.forward" in host_result(HOOKED)


def test_only_our_low_latency_layers_are_captured() -> None:
    assert host_result(program("captured_forward")) == {
        "outside": "the host's",
        "inside": "captured, extend True",
        "normal mode for prefill": "the host's",
        "the host's experts": "the host's",
        "inside one graph": "captured, extend True",
        "extend afterwards": False,
    }
