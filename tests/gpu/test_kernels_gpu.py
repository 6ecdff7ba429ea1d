"""The kernels on a GPU: every candidate, poisoned inputs, graphs, seeds, capacities."""

import os
import random
import time
from dataclasses import replace

import pytest
import torch

from moe_plugin.kernels.experts import batched_experts, batched_experts_torch, warmup
from moe_plugin.kernels.formats import BF16, FP8_BLOCK, Format
from moe_plugin.kernels.launch import Launch, Shape, pick_launch, portable_launch
from moe_plugin.kernels.problem import device_of
from moe_plugin.kernels.tuning.precompile import precompile
from tests.support.kernel_cases import (
    ACTIVATIONS,
    DIFFERENT,
    MODELS,
    Layer,
    check,
    every_candidate,
    make_layer,
    one_hot_counts,
    zipf_counts,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="requires an NVIDIA GPU"),
]
needs_sm90 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="requires an SM90 GPU (H100, H200)",
)
# Stage `check` of the kernel benchmark goes through all formats.
NAMES = pytest.mark.parametrize("fmt", DIFFERENT.values(), ids=DIFFERENT)
LAYERS = {
    "few tiles": (128, 256, 384, (0, 1, 128, 33)),
    "straddling scale blocks": (64, 1152, 176, (5, 0, 64, 17, 1)),
    "many tiles per program": (512, 2048, 1024, (64, 0, 300, 512, 7, 1, 129, 40)),
    "one expert": (256, 1024, 2048, (77,)),
    # No multiple of 8: one expert's last tile and the next one's first lie within eight rows.
    "odd capacity": (68, 2048, 512, (66, 5)),
    "full experts": (1024, 1024, 384, (1024, 1000)),
    "around the heights": (512, 1024, 384, (8, 9, 65, 0, 129, 192, 193, 64, 128, 257)),
    "one hot expert, last": (512, 1024, 384, (0, 1, 0, 0, 0, 0, 0, 500)),
}


def run_layer(layer: Layer, expected_m: int = 8, launch: Launch | None = None) -> torch.Tensor:
    out = layer.poisoned_output()
    return batched_experts(*layer.args(), expected_m, out=out, launch=launch)


def compiled_candidates(shape: Shape) -> list[Launch]:
    """Compiled in as many processes as there are cores: one would take a minute a case."""
    launches = list(every_candidate(shape))
    device = device_of(torch.empty(0, device="cuda"))
    assert not precompile([(shape, each) for each in launches], device, os.cpu_count() or 4)
    return launches


@needs_sm90
@NAMES
@pytest.mark.parametrize("case", LAYERS)
def test_every_candidate_is_right_and_repeatable(case: str, fmt: Format) -> None:
    capacity, hidden, inter, counts = LAYERS[case]
    layer = make_layer(capacity, hidden, inter, counts, fmt, "cuda")
    for launch in compiled_candidates(Shape(len(counts), capacity, hidden, inter, fmt)):
        out = run_layer(layer, launch=launch)
        check(str(launch), out, layer)
        again = run_layer(layer, launch=launch)
        assert torch.equal(out.view(torch.int16), again.view(torch.int16)), launch


@needs_sm90
@NAMES
def test_a_row_has_the_same_bits_in_a_tile_of_any_height(fmt: Format) -> None:
    """Fewer rows of the same expert end in a shorter tile, elsewhere in the list."""
    capacity, hidden, inter = 512, 1024, 384
    full = make_layer(capacity, hidden, inter, (300, 512, 300, 0), fmt, "cuda")
    for launch in compiled_candidates(Shape(4, capacity, hidden, inter, fmt)):
        want = run_layer(full, launch=launch).view(torch.int16)
        for rows in (1, 8, 9, 64, 65, 128, 129, 192, 193, 300):
            counts = (rows, 0, 301 - rows, 0)
            got = run_layer(replace(full, counts=counts), launch=launch).view(torch.int16)
            for expert, live in enumerate(counts):
                live = min(live, full.counts[expert])
                same = torch.equal(got[expert, :live], want[expert, :live])
                assert same, f"expert {expert}, {live} rows: {launch}"


@needs_sm90
@NAMES
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("case", LAYERS)
def test_activations(case: str, name: str, fmt: Format) -> None:
    """Every epilogue behind weights and rows as the wide operand, one and two warp groups."""
    capacity, hidden, inter, counts = LAYERS[case]
    layer = make_layer(capacity, hidden, inter, counts, fmt, "cuda", activation=ACTIVATIONS[name])
    for expected_m in (1, 16, 64, 128, 512):
        out = run_layer(layer, expected_m)
        check(f"{name}, {expected_m}", out, layer)
        again = run_layer(layer, expected_m)
        assert torch.equal(out.view(torch.int16), again.view(torch.int16))


@NAMES
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_on_portable_kernels(name: str, fmt: Format) -> None:
    layer = make_layer(64, 256, 176, (5, 0, 64), fmt, "cuda", activation=ACTIVATIONS[name])
    launch = portable_launch(Shape(3, 64, 256, 176, fmt), 16)
    check(name, run_layer(layer, launch=launch), layer)


@needs_sm90
def test_interleaved_weights_whose_depth_ends_within_a_step() -> None:
    """The last step of a gate row reads the first channels of its up row, times rows of zero."""
    layer = make_layer(64, 144, 96, (5, 64), BF16, "cuda", activation=ACTIVATIONS["interleaved"])
    for expected_m in (1, 64, 512):
        check("depth", run_layer(layer, expected_m), layer)


@NAMES
@pytest.mark.parametrize("case", LAYERS)
def test_portable_kernels(case: str, fmt: Format) -> None:
    capacity, hidden, inter, counts = LAYERS[case]
    layer = make_layer(capacity, hidden, inter, counts, fmt, "cuda")
    shape = Shape(len(counts), capacity, hidden, inter, fmt)
    for m in (1, 64):
        check("portable", run_layer(layer, launch=portable_launch(shape, m)), layer)


@NAMES
@pytest.mark.parametrize("seed", range(100))
def test_fresh_seeds(fmt: Format, seed: int) -> None:
    draw = random.Random(seed)
    capacity = draw.choice((16, 48, 256, 1024))
    picks = (0, 1, capacity, draw.randint(0, capacity))
    counts = tuple(draw.choice(picks) for _ in range(draw.randint(1, 9)))
    hidden, inter = 128 * draw.randint(1, 9), 16 * draw.randint(1, 40)
    layer = make_layer(capacity, hidden, inter, counts, fmt, "cuda", seed)
    check(f"{counts}", run_layer(layer, draw.choice((1, 8, 16, 64, 128, 600))), layer)


@NAMES
@pytest.mark.parametrize("capacity", [1, 16, 17, 66, 100, 512, 2048, 8192])
def test_capacities(fmt: Format, capacity: int) -> None:
    layer = make_layer(capacity, 512, 256, (capacity, 0, 1, min(capacity, 12)), fmt, "cuda")
    for expected_m in (1, 64, 512):
        check(f"{capacity}", run_layer(layer, expected_m), layer)


@NAMES
@pytest.mark.parametrize("expected_m", [1, 64, 512])
def test_counts_outside_the_capacity_read_as_the_nearest_inside(
    fmt: Format, expected_m: int
) -> None:
    masked_m = (40, 3, -1000, 2**31 - 1, -(2**31), 32)
    counts = tuple(min(32, max(0, m)) for m in masked_m)
    layer = make_layer(32, 512, 384, counts, fmt, "cuda")
    *tensors, _ = layer.args()
    out = layer.poisoned_output()
    given = torch.tensor(masked_m, dtype=torch.int32, device="cuda")
    batched_experts(*tensors, given, expected_m, out=out)
    check("clamped", out, layer)


@pytest.mark.parametrize("what", ["masked_m", "out", "scales", "hidden"])
def test_refused_with_a_reason(what: str) -> None:
    """What was once accepted and misread; all the rest is in tests/unit/test_kernels_refusals."""
    layer = make_layer(16, 256, 64, (5, 9), FP8_BLOCK, "cuda")
    x, x_scale, weights, masked_m = layer.args()
    out = layer.poisoned_output()
    batched_experts(x, x_scale, weights, masked_m, 8, out=out)  # and once more, now that it ran
    if what == "masked_m":
        masked_m = torch.stack([masked_m, masked_m], 1)[:, 0]
    elif what == "out":
        out = out.transpose(0, 1).contiguous().transpose(0, 1)
    elif what == "scales":
        weights = replace(weights, w13_scale=weights.w13_scale.double())
    else:
        x, weights = x[..., :192], replace(weights, w13=weights.w13[..., :192].contiguous())
    with pytest.raises(ValueError, match=r"got .*, allowed .* Fix: "):
        batched_experts(x, x_scale, weights, masked_m, 8, out=out)


@NAMES
def test_graph_replays_with_changed_counts(fmt: Format) -> None:
    layer = make_layer(64, 512, 384, (64, 64, 64, 64), fmt, "cuda")
    args, out = list(layer.args()), layer.poisoned_output()
    batched_experts(*args, 8, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batched_experts(*args, 8, out=out)
    for counts in ((0, 0, 0, 0), (64, 1, 0, 9), (1, 1, 1, 1), (64, 64, 64, 64)):
        args[-1].copy_(torch.tensor(counts, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        now = Layer(*args[:-1], counts)
        check(f"{counts}", out, now)


@NAMES
def test_model_size_with_skewed_routing(fmt: Format) -> None:
    model = MODELS[2]
    for counts in (zipf_counts(64, 16, 512), one_hot_counts(64, 8, 512)):
        layer = make_layer(512, model.hidden, model.inter, counts, fmt, "cuda")
        check(model.name, run_layer(layer, 16), layer, [0, 1, 31, 63])


def test_unaligned_rows_take_the_portable_kernels() -> None:
    layer = make_layer(16, 256, 64, (5, 9), BF16, "cuda")
    wide = torch.full((2, 16, 264), torch.nan, dtype=torch.bfloat16, device="cuda")
    wide[:, :, :256] = layer.x
    strided = Layer(wide[:, :, :256], None, layer.weights, layer.counts)
    out = batched_experts(*strided.args(), 8, out=layer.poisoned_output())
    check("strided", out, layer)


@needs_sm90
@NAMES
def test_warmup_leaves_nothing_to_compile(fmt: Format) -> None:
    begin = time.monotonic()
    activation = ACTIVATIONS["scaled, interleaved, bias (gpt-oss)"]
    activation = replace(activation, interleaved=not fmt.packed)
    rows = (1, 8, 16, 64, 512)
    assert warmup(Shape(4, 64, 512, 384, fmt), rows) > 0
    assert warmup(Shape(4, 64, 512, 384, fmt, activation), rows) > 0
    assert time.monotonic() - begin < 60
    layer = make_layer(64, 512, 384, (3, 0, 64, 9), fmt, "cuda")
    run_layer(layer)  # loads what the launcher itself needs
    from moe_plugin.kernels.sm90 import gemm_kernel

    cache = gemm_kernel.experts_kernel.device_caches[torch.cuda.current_device()][0]
    before = len(cache)
    other = make_layer(64, 512, 384, (3, 0, 64, 9), fmt, "cuda", activation=activation)
    for m in rows:
        run_layer(layer, m)
        run_layer(other, m)
    assert len(cache) == before, "a launch compiled a kernel that warmup had not"
    assert pick_launch(Shape(4, 64, 512, 384, fmt), 8, device_of(layer.x)).hopper


@NAMES
def test_torch_layer_needs_no_synchronisation(fmt: Format) -> None:
    layer = make_layer(32, 256, 64, (5, 32), fmt, "cuda")
    args, out = layer.args(), layer.poisoned_output()
    graph = torch.cuda.CUDAGraph()
    batched_experts_torch(*args, 4, out=out)
    with torch.cuda.graph(graph):  # fails if anything waits for the device
        batched_experts_torch(*args, 4, out=out)
    graph.replay()
    check("torch", out, layer)
