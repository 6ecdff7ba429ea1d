"""What the entry point refuses: a reason with got, allowed and fix, never wrong numbers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_plugin.kernels.entry_checks import check_layer
from moe_plugin.kernels.formats import BF16, FORMATS, FP8_BLOCK, Format
from moe_plugin.kernels.launch import Shape
from tests.support.kernel_cases import make_layer

EXPERTS, CAPACITY, HIDDEN, INTER = 3, 16, 256, 64
SHAPE = r".* Fix: "


def arguments(fmt: Format) -> dict[str, Any]:
    """Those of a good call, by name."""
    layer = make_layer(CAPACITY, HIDDEN, INTER, (5, 0, 16), fmt, "cpu")
    x, x_scale, weights, masked_m = layer.args()
    return {"x": x, "x_scale": x_scale, "weights": weights, "masked_m": masked_m,
            "out": layer.poisoned_output()}  # fmt: skip


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a wider last dimension."""
    wide = torch.empty((*tensor.shape[:-1], 2 * tensor.shape[-1]), dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def of_weights(**change: Callable[[torch.Tensor], Any]) -> Callable[[dict], dict]:
    """Change fields of the weights."""

    def apply(call: dict) -> dict:
        weights = call["weights"]
        new = {name: f(getattr(weights, name)) for name, f in change.items()}
        return {"weights": replace(weights, **new)}

    return apply


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_a_good_call_passes_and_tells_its_shape(fmt: Format) -> None:
    call = arguments(fmt)
    assert check_layer(**call) == Shape(EXPERTS, CAPACITY, HIDDEN, INTER, fmt)
    assert check_layer(**(call | {"out": None})) == Shape(EXPERTS, CAPACITY, HIDDEN, INTER, fmt)


BOTH = {
    "long counts": (lambda c: {"masked_m": c["masked_m"].long()}, "masked_m: got .*int64"),
    "strided counts": (lambda c: {"masked_m": strided(c["masked_m"])}, "strides of masked_m"),
    "too few counts": (lambda c: {"masked_m": c["masked_m"][:-1]}, r"masked_m: got \(2,\)"),
    "float out": (lambda c: {"out": c["out"].float()}, "out: got .*float32"),
    "half the rows of out": (lambda c: {"out": c["out"][:, :8]}, r"out: got \(3, 8, 256\)"),
    "transposed out": (
        lambda c: {"out": c["out"].transpose(0, 1).contiguous().transpose(0, 1)},
        "strides of out",
    ),
    "strided channels": (lambda c: {"x": strided(c["x"])}, "strides of hidden_states"),
    "flat rows": (lambda c: {"x": c["x"][0]}, "hidden_states and w2"),
    "strided weights": (of_weights(w13=strided), "strides of w13"),
    "other width": (
        of_weights(w13=lambda w: w[:, : w.shape[1] * 3 // 4]),
        "(w13|w13_scale): got",  # packed, the width of w13 is what tells the size
    ),
    "other dtype": (of_weights(w2=lambda w: w.half()), "w2: got .*float16"),
    "unknown format": (of_weights(format=lambda f: replace(f, name="fp6")), "format: got fp6"),
    "changed format": (of_weights(format=lambda f: replace(f, group_size=7)), "format: got"),
    "scales of the other kind": (
        lambda c: {"x_scale": None if c["x_scale"] is not None else torch.ones(3, 16, 2)},
        "hidden_states_scale: got",
    ),
    "other device": (lambda c: {"masked_m": c["masked_m"].to("meta")}, "device of masked_m"),
    "a bias that the activation has not": (
        of_weights(w2_bias=lambda _: torch.zeros(3, HIDDEN)),
        "w2_bias: got a tensor",
    ),
    "no bias": (
        of_weights(activation=lambda a: replace(a, bias=True)),
        "w13_bias: got nothing",
    ),
}
FP8 = {
    "fewer scales": (of_weights(w13_scale=lambda s: s[..., :-1]), "w13_scale: got"),
    "double scales": (of_weights(w2_scale=lambda s: s.double()), "w2_scale: got .*float64"),
    "strided scales": (of_weights(w13_scale=strided), "strides of w13_scale"),
    "no scales": (of_weights(w2_scale=lambda _: None), "w2_scale: got nothing"),
    "row scales of other groups": (
        lambda c: {"x_scale": c["x_scale"][:, :, :1]},
        "hidden_states_scale: got",
    ),
}


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("case", BOTH)
def test_refused_in_any_format(case: str, fmt: Format) -> None:
    call = arguments(fmt)
    change, message = BOTH[case]
    with pytest.raises(ValueError, match=message + SHAPE):
        check_layer(**(call | change(call)))


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.fp8_rows], ids=str)
@pytest.mark.parametrize("case", FP8)
def test_refused_in_fp8(case: str, fmt: Format) -> None:
    call = arguments(fmt)
    change, message = FP8[case]
    with pytest.raises(ValueError, match=message + SHAPE):
        check_layer(**(call | change(call)))


@pytest.mark.parametrize(
    ("fmt", "hidden", "inter", "message"),
    [
        (FP8_BLOCK, 192, 64, "hidden size of fp8_block: got 192, allowed multiples of 128"),
        (BF16, 136, 64, "hidden size of bf16: got 136, allowed multiples of 16"),
        (BF16, 128, 72, "intermediate size of bf16: got 72, allowed multiples of 16"),
    ],
)
def test_sizes_that_no_tile_fits(fmt: Format, hidden: int, inter: int, message: str) -> None:
    layer = make_layer(16, hidden, inter, (5, 16), BF16, "cpu")
    weights = replace(layer.weights, format=fmt)
    with pytest.raises(ValueError, match=message):
        check_layer(layer.x, None, weights, layer.args()[-1], None)
