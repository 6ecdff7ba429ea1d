"""The portable kernels on CPU, through Triton's interpreter.

The interpreter has to be chosen before the kernels are imported, so a plain run starts a second
pytest on this file with TRITON_INTERPRET=1; set it yourself to run the cases directly.
"""

import os
import random
import subprocess
import sys

import pytest
import torch

from moe_plugin.kernels.formats import BF16, FORMATS, FP8_BLOCK, Format
from tests.support.kernel_cases import ACTIVATIONS, DIFFERENT, Layer, check, make_layer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")

if INTERPRETED:
    from moe_plugin.kernels import problem
    from moe_plugin.kernels.experts import batched_experts
    from moe_plugin.kernels.launch import Device

NAMES = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
FEWER = pytest.mark.parametrize("fmt", DIFFERENT.values(), ids=DIFFERENT)


@pytest.mark.timeout(1800)
@pytest.mark.skipif(INTERPRETED, reason="this is the inner run")
def test_cases_in_a_process_of_their_own() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


def run_layer(layer: "Layer", expected_m: int = 4) -> torch.Tensor:
    return batched_experts(*layer.args(), expected_m, out=layer.poisoned_output())


@inside
@FEWER
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 1), (16, 16), (7, 12)], ids=str)
def test_counts(fmt: Format, counts: tuple[int, ...]) -> None:
    layer = make_layer(16, 256, 64, counts, fmt, "cpu")
    check("counts", run_layer(layer), layer)


@inside
@FEWER
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(fmt: Format, name: str) -> None:
    layer = make_layer(16, 256, 112, (5, 0, 16), fmt, "cpu", activation=ACTIVATIONS[name])
    check(name, run_layer(layer), layer)


@inside
@FEWER
@pytest.mark.parametrize("masked_m", [(40, 3, -1000), (-1, 2**31 - 1, 16), (16, -(2**31), 17)])
def test_counts_outside_the_capacity_read_as_the_nearest_inside(
    fmt: Format, masked_m: tuple[int, ...]
) -> None:
    counts = tuple(min(16, max(0, m)) for m in masked_m)
    layer = make_layer(16, 256, 64, counts, fmt, "cpu")
    *tensors, _ = layer.args()
    out = layer.poisoned_output()
    batched_experts(*tensors, torch.tensor(masked_m, dtype=torch.int32), 4, out=out)
    check("clamped", out, layer)


@inside
@FEWER
@pytest.mark.parametrize("capacity", [16, 17, 48, 66, 128])
def test_capacities(fmt: Format, capacity: int) -> None:
    layer = make_layer(capacity, 128, 64, (capacity, 0, 3), fmt, "cpu")
    check("capacity", run_layer(layer), layer)


@inside
@NAMES
@pytest.mark.parametrize(("hidden", "inter"), [(128, 16), (256, 112), (384, 176), (128, 208)])
def test_ragged_channels(fmt: Format, hidden: int, inter: int) -> None:
    layer = make_layer(16, hidden, inter, (5, 16), fmt, "cpu")
    check("tails", run_layer(layer), layer)


@inside
@pytest.mark.parametrize("hidden", [16, 48, 144])
def test_bf16_hidden_of_any_multiple_of_16(hidden: int) -> None:
    layer = make_layer(16, hidden, 48, (5, 16), BF16, "cpu")
    check("hidden", run_layer(layer), layer)


@inside
@FEWER
@pytest.mark.parametrize("seed", range(5))
def test_fresh_seeds(fmt: Format, seed: int) -> None:
    draw = random.Random(seed)
    counts = tuple(draw.choice((0, 1, draw.randint(0, 32), 32)) for _ in range(4))
    layer = make_layer(32, 128, 16 * draw.randint(1, 6), counts, fmt, "cpu", seed)
    check("seed", run_layer(layer, draw.randint(1, 64)), layer)


@inside
@FEWER
def test_rows_give_the_same_bits_whatever_the_other_counts_are(fmt: Format) -> None:
    layer = make_layer(16, 256, 64, (5, 9), fmt, "cpu")
    alone = Layer(layer.x, layer.x_scale, layer.weights, (0, 9))
    assert torch.equal(run_layer(layer)[1, :9], run_layer(alone)[1, :9])


@inside
def test_scales_are_read_by_stride() -> None:
    layer = make_layer(16, 256, 64, (5, 9), FP8_BLOCK, "cpu")
    dense = layer.args()
    rows = (dense[0], dense[1].contiguous(), *dense[2:])
    assert dense[1].stride() != rows[1].stride()
    out = batched_experts(*rows, 4, out=layer.poisoned_output())
    assert torch.equal(out.view(torch.int16), run_layer(layer).view(torch.int16))


@inside
@pytest.mark.parametrize("inter", [64, 176])
def test_fp8_decoded_from_bytes(inter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "INTERPRETER", Device("no fp8", (8, 0), 4))
    layer = make_layer(16, 128, inter, (5, 16, 0), FP8_BLOCK, "cpu")
    check("decoded", run_layer(layer), layer)
