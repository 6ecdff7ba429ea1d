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

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in a process with TRITON_INTERPRET=1")

if INTERPRETED:
    from moe_plugin.kernels import problem
    from moe_plugin.kernels.experts import batched_experts
    from moe_plugin.kernels.launch import Device
    from tests.support.kernel_cases import Layer, check, make_layer

DTYPES = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])


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
@DTYPES
@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 1), (16, 16), (7, 12)], ids=str)
def test_counts(fp8: bool, counts: tuple[int, ...]) -> None:
    layer = make_layer(16, 256, 64, counts, fp8, "cpu")
    check("counts", run_layer(layer), layer)


@inside
@DTYPES
@pytest.mark.parametrize("capacity", [16, 48, 128])
def test_capacities(fp8: bool, capacity: int) -> None:
    layer = make_layer(capacity, 128, 64, (capacity, 0, 3), fp8, "cpu")
    check("capacity", run_layer(layer), layer)


@inside
@DTYPES
@pytest.mark.parametrize(("hidden", "inter"), [(128, 16), (256, 112), (384, 176), (128, 208)])
def test_ragged_channels(fp8: bool, hidden: int, inter: int) -> None:
    layer = make_layer(16, hidden, inter, (5, 16), fp8, "cpu")
    check("tails", run_layer(layer), layer)


@inside
@pytest.mark.parametrize("hidden", [16, 48, 144])
def test_bf16_hidden_of_any_multiple_of_16(hidden: int) -> None:
    layer = make_layer(16, hidden, 48, (5, 16), False, "cpu")
    check("hidden", run_layer(layer), layer)


@inside
@DTYPES
@pytest.mark.parametrize("seed", range(10))
def test_fresh_seeds(fp8: bool, seed: int) -> None:
    draw = random.Random(seed)
    counts = tuple(draw.choice((0, 1, draw.randint(0, 32), 32)) for _ in range(4))
    layer = make_layer(32, 128, 16 * draw.randint(1, 6), counts, fp8, "cpu", seed)
    check("seed", run_layer(layer, draw.randint(1, 64)), layer)


@inside
@DTYPES
def test_rows_give_the_same_bits_whatever_the_other_counts_are(fp8: bool) -> None:
    layer = make_layer(16, 256, 64, (5, 9), fp8, "cpu")
    alone = Layer(layer.x, layer.x_scale, layer.w13, layer.w13_scale, layer.w2, layer.w2_scale,
                  (0, 9))  # fmt: skip
    assert torch.equal(run_layer(layer)[1, :9], run_layer(alone)[1, :9])


@inside
def test_scales_are_read_by_stride() -> None:
    layer = make_layer(16, 256, 64, (5, 9), True, "cpu")
    dense = layer.args()
    rows = (dense[0], dense[1].contiguous(), *dense[2:])
    assert dense[1].stride() != rows[1].stride()
    out = batched_experts(*rows, 4, out=layer.poisoned_output())
    assert torch.equal(out.view(torch.int16), run_layer(layer).view(torch.int16))


@inside
@pytest.mark.parametrize("inter", [64, 176])
def test_fp8_decoded_from_bytes(inter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "INTERPRETER", Device("no fp8", (8, 0), 4))
    layer = make_layer(16, 128, inter, (5, 16, 0), True, "cpu")
    check("decoded", run_layer(layer), layer)
