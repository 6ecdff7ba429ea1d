"""4-bit weights as the host's methods hold them, repacked: what they stand for stays the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_plugin.errors import UnsupportedError
from moe_plugin.integration.resolve.int4_facts import is_int4
from moe_plugin.integration.serve.expert_weights import expert_weights, loaded_format
from moe_plugin.integration.serve.marlin_stub import refuse_rows
from moe_plugin.integration.serve.packed_layouts import stored_codes
from moe_plugin.integration.serve.packed_weights import take_over_loading
from moe_plugin.kernels.experts_torch import dequantise_expert_torch
from moe_plugin.planning.leaving import LEAVE_TEXT

from ..support.packed_layer import CASES, EXPERTS, HIDDEN, INTER, NAMES, host_layer, parameter


@pytest.mark.parametrize(("method", "fmt"), CASES, ids=str)
def test_repacked_weights_are_the_ones_that_were_loaded(method: str, fmt: Any) -> None:
    layer, expected = host_layer(method, fmt.group_size, fmt.zero_points)
    assert loaded_format(layer) == fmt
    kept = [stored_codes(layer, name) for name in NAMES]
    before = [p.data_ptr() for p in kept]
    take_over_loading(layer)
    for _ in range(2):  # the host may ask twice
        layer.quant_method.process_weights_after_loading(layer)
        weights = expert_weights(layer)
        assert weights.format == loaded_format(layer) == fmt
        for expert in range(EXPERTS):
            w13, w2 = dequantise_expert_torch(weights, expert)
            assert torch.equal(w13, expected["w13"][expert])
            assert torch.equal(w2, expected["w2"][expert])
    assert [p.data_ptr() for p in kept] == before, "codes stay in the memory that they had"
    held = sum(p.numel() * p.element_size() for p in layer.parameters())
    weighs = EXPERTS * 3 * HIDDEN * INTER
    assert held == weighs // 2 + weighs // fmt.group_size * fmt.scale_bytes


def test_scales_move_with_their_experts() -> None:
    """Whoever moves experts between ranks takes every parameter that has one row for each."""
    layer, _ = host_layer("CompressedTensorsFusedMoEMethod", 32, False)
    take_over_loading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    moved = {name for name, p in layer.named_parameters() if len(p) == EXPERTS}
    assert moved == {f"{n}_{k}" for n in NAMES for k in ("weight_packed", "packed_scales")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_bits": 8}, "8 bits"),
        ({"actorder": "group"}, "ordered by activation"),
    ],
)
def test_what_kernels_do_not_decode_is_refused(change: dict[str, Any], says: str) -> None:
    layer, _ = host_layer("CompressedTensorsFusedMoEMethod", 32, False)
    vars(layer.scheme).update(change)
    with pytest.raises(
        UnsupportedError, match=rf"MoE layer 4: packed weights: got .*{says}.*Fix: {LEAVE_TEXT}"
    ):
        loaded_format(layer)


def test_zero_points_that_the_host_does_not_transpose_are_refused() -> None:
    """Where asymmetric compressed-tensors keeps them; its codes are repacked, they would not be."""
    layer, _ = host_layer("CompressedTensorsFusedMoEMethod", 32, False)
    layer.w13_weight_zero_point = parameter(torch.zeros(EXPERTS, 12, 32, dtype=torch.int32))
    with pytest.raises(UnsupportedError, match=r"MoE layer 4: packed weights: got .*zero points"):
        loaded_format(layer)


def test_a_layer_whose_scheme_says_no_bits_is_refused() -> None:
    """NVFP4 of compressed-tensors, as a draft may have it."""
    layer, _ = host_layer("CompressedTensorsFusedMoEMethod", 32, False)
    layer.scheme = layer.quant_method.quant_config = SimpleNamespace()
    with pytest.raises(UnsupportedError, match=r"MoE layer 4: packed weights: got .*0 bits"):
        loaded_format(layer)


@pytest.mark.parametrize("again", [False, True], ids=["first load", "reload"])
def test_exponents_that_kernels_do_not_compute_leave_the_layer_as_it_was(again: bool) -> None:
    """Of w2, which comes last; the host then restores, and loads the weights that it had."""
    layer, stands_for = host_layer("Fp8MoEMethod", 32, False, inter=96)
    loaded = {name: p.detach().clone() for name, p in layer.named_parameters()}
    take_over_loading(layer)
    method = layer.quant_method
    if again:
        method.process_weights_after_loading(layer)
        method.restore_weights_before_loading(layer)
    layer.w2_weight_scale_inv.data[1, 2, 2] = 4.0  # 2**(129 - 127)
    says = rf"MoE layer 4: exponent of an FP4 scale of w2: got 129, .*Fix: {LEAVE_TEXT}"
    with pytest.raises(UnsupportedError, match=says):
        method.process_weights_after_loading(layer)
    method.restore_weights_before_loading(layer)
    layer.w2_weight_scale_inv.data[1, 2, 2] = loaded["w2_weight_scale_inv"][1, 2, 2]
    for name, was in loaded.items():
        assert torch.equal(getattr(layer, name), was), name
    method.process_weights_after_loading(layer)
    for expert in range(EXPERTS):
        found = dequantise_expert_torch(expert_weights(layer), expert)
        for name, weights in zip(NAMES, found, strict=True):
            assert torch.equal(weights, stands_for[name][expert])


def test_rows_that_are_not_ours_lead_out_of_the_plugin() -> None:
    """The host may compute them in another mode; ours are registered in low latency alone."""
    with pytest.raises(UnsupportedError, match=rf"got tuple.*Fix: {LEAVE_TEXT}"):
        refuse_rows(())


COMPRESSED = {
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "weights": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128}
        }
    },
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("compressed-tensors", COMPRESSED),
        ("awq_marlin", {"bits": 4, "group_size": 128, "zero_point": True}),
        ("gptq_marlin", {"bits": 4, "group_size": 128, "sym": True}),
        ("moe_wna16", {"bits": 4, "group_size": 128}),
    ],
)
def test_plans_leave_out_sizes_that_no_groups_fill(name: str, config: dict[str, Any]) -> None:
    """The host halves such groups, or has one too few: its layer is none of ours."""
    assert is_int4(name, config, (2048, 768))
    assert not is_int4(name, config, (2048, 704))
    assert not is_int4(name, config, (2112, 768))


def test_groups_of_another_size_are_refused() -> None:
    layer, _ = host_layer("CompressedTensorsFusedMoEMethod", 64, False)
    with pytest.raises(UnsupportedError, match="groups of 64"):
        loaded_format(layer)
