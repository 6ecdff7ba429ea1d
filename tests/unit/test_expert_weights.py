"""Which of a host layer's attributes our experts read, for each quantization method."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_plugin.errors import UnsupportedError
from moe_plugin.integration.serve.expert_weights import (
    expert_weights,
    layer_activation,
    loaded_format,
)
from moe_plugin.kernels.formats import (
    BF16,
    FP8_BLOCK,
    FP8_CHANNEL,
    FP8_TENSOR,
    Activation,
    Format,
)

EXPERTS, HIDDEN, INTER = 3, 256, 192
FP8 = torch.float8_e4m3fn


def layer(dtype: torch.dtype, **attributes: Any) -> SimpleNamespace:
    return SimpleNamespace(
        layer_id=4,
        moe_runner_config=SimpleNamespace(activation="silu"),
        w13_weight=torch.zeros(EXPERTS, 2 * INTER, HIDDEN).to(dtype),
        w2_weight=torch.zeros(EXPERTS, HIDDEN, INTER).to(dtype),
        **attributes,
    )


BLOCKS = {"w13": torch.rand(EXPERTS, 3, 2), "w2": torch.rand(EXPERTS, 2, 2)}
METHODS = {
    "Fp8MoEMethod, blocks": (FP8_BLOCK, {f"{k}_weight_scale_inv": s for k, s in BLOCKS.items()}),
    "compressed-tensors, blocks": (FP8_BLOCK, {f"{k}_weight_scale": s for k, s in BLOCKS.items()}),
    "per tensor": (
        FP8_TENSOR,
        {"w13_weight_scale": torch.rand(EXPERTS), "w2_weight_scale": torch.rand(EXPERTS)},
    ),
    "per channel": (
        FP8_CHANNEL,
        {
            "w13_weight_scale": torch.rand(EXPERTS, 2 * INTER, 1),
            "w2_weight_scale": torch.rand(EXPERTS, HIDDEN, 1),
        },
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_formats_are_told_by_their_scales_and_nothing_is_copied(method: str) -> None:
    fmt, scales = METHODS[method]
    host = layer(FP8, w13_input_scale=torch.rand(()), **scales)
    weights = expert_weights(host)
    assert weights.format == loaded_format(host) == fmt
    for mine, theirs in zip((weights.w13_scale, weights.w2_scale), scales.values(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
        assert mine.numel() == theirs.numel()
        assert mine.is_contiguous()


def test_gate_and_up_have_a_scale_each_until_they_are_loaded() -> None:
    host = layer(FP8, w13_weight_scale=torch.rand(EXPERTS, 2))
    assert loaded_format(host) == FP8_TENSOR


@pytest.mark.parametrize(
    ("name", "block", "fmt"),
    [("Fp8MoEMethod", False, FP8_TENSOR), ("Fp8MoEMethod", True, FP8_BLOCK),
     ("UnquantizedFusedMoEMethod", False, BF16)],
)  # fmt: skip
def test_bf16_weights_that_the_host_will_quantise(name: str, block: bool, fmt: Format) -> None:
    method = type(name, (), {"block_quant": block})()
    assert loaded_format(layer(torch.bfloat16, quant_method=method)) == fmt


@pytest.mark.parametrize("scale", [None, torch.rand(EXPERTS, 2 * INTER, 2)], ids=["none", "groups"])
def test_scales_of_another_kind_are_refused(scale: torch.Tensor | None) -> None:
    with pytest.raises(UnsupportedError, match=r"MoE layer 4: scales of w13: got .*Fix: "):
        expert_weights(layer(FP8, w13_weight_scale=scale))


def test_fp4_that_the_host_turns_into_fp8_is_fp8_before_it_is_loaded() -> None:
    """Placeholders are packed bytes with scales of their own until then."""
    method = SimpleNamespace(is_fp4_expert=True, dequant_fp4_to_fp8=True)
    host = layer(FP8, quant_method=method)
    host.w13_weight = torch.zeros(EXPERTS, 2 * INTER, HIDDEN // 2, dtype=torch.int8)
    host.w13_weight_scale_inv = torch.zeros(EXPERTS, 2 * INTER, HIDDEN // 32)
    assert loaded_format(host) == FP8_BLOCK


def test_a_clamp_holds_beside_a_limit() -> None:
    """GigaChat-3.5 sets both, the clamp after its layers are made."""
    host = layer(FP8)
    host.moe_runner_config.swiglu_limit = 7.0
    assert layer_activation(host) == Activation(limit=7.0)
    host.moe_runner_config.gemm1_clamp_limit = 7.0
    assert layer_activation(host) == Activation("swiglu_clamped", limit=7.0)
