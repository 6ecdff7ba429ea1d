"""What a transport must do, case by case: the same code for DeepEP and, on CPU, for its stand-in.

A case leaves every rank after the same number of collective calls, also where it fails: asserts
come after them. So one failed case does not keep the others from being run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from moe_plugin.backends.deepep import device_bytes, low_latency_rdma_bytes
from moe_plugin.errors import BudgetError
from moe_plugin.planning.memory import UNSPLIT, workspace_bytes
from moe_plugin.runtime.metadata import DPMetadata
from moe_plugin.runtime.runner import make_moe_runner
from moe_plugin.runtime.stats import Stats
from moe_plugin.runtime.transports.guarded import GuardedTransport

from .world import Layer, World

Case = Callable[[World], None]

OWN_STEPS = 16  # in the case of that name, for each kind of layer
LARGE_TENSORS = 4  # of a layer: rows, their scales, the result, and what lies between the GEMMs


def counts_of(world: World) -> dict[str, list[int]]:
    """Tokens per rank."""
    capacity, ranks = world.sizes.capacity, world.ranks
    return {
        "T": [capacity] * ranks,
        "T-1": [capacity - 1] * ranks,
        "uneven": [(31 * rank + 7) % (capacity + 1) for rank in range(ranks)],
        "one idle": [0] + [min(9, capacity)] * (ranks - 1),
        "all idle": [0] * ranks,
    }


def layer(world: World, counts: str, routing: str, fp8: bool = False) -> None:
    """A whole layer against the dense one."""
    case = world.layer(world.case(counts_of(world)[counts], routing, seed=len(counts)), fp8)
    case.check(case(), f"{counts}, {routing}")


def no_expert(world: World) -> None:
    """Only -1: zeros come back."""
    out = world.layer(world.case([world.sizes.capacity] * world.ranks, "none"))()
    assert not out.any(), "tokens without any expert are not zero"


def over_capacity(world: World) -> None:
    """T + 1 tokens raise a Python error before anything is sent; the transport serves on."""
    capacity = world.sizes.capacity
    said = [_refusal(world.layer(world.case([capacity + 1] * world.ranks)))]
    # One rank over, and the metadata says so: the ranks within their budget raise as well.
    tokens = DPMetadata(tuple([capacity + 1] + [1] * (world.ranks - 1)))
    guarded = GuardedTransport(
        world.transport.inner, capacity, metadata=lambda: tokens, stats=Stats()
    )
    said.append(_refusal(world.layer(world.case(list(tokens.sp_local_sizes))), guarded))
    after = world.layer(world.case([capacity] * world.ranks))
    got = after()
    assert f"got {capacity + 1} on this rank" in said[0], said[0]
    assert f"got {capacity + 1} on " in said[1], said[1]
    assert "Fix:" in said[0], said[0]
    after.check(got, "after the refusals")


def _refusal(layer: Layer, transport: GuardedTransport | None = None) -> str:
    try:
        layer.runner.forward(
            transport or layer.world.transport,
            layer.x,
            layer.ids,
            layer.topk_weights,
            layer.experts,
        )
    except BudgetError as error:
        return str(error)
    return "nothing was raised"


def against_torch(world: World, counts: str, routing: str) -> None:
    """Counts, rows by source, and combined sums equal the torch transport's."""
    ours = world.layer(world.case(counts_of(world)[counts], routing, seed=17))
    capacity, device = world.sizes.capacity, world.reference_device
    recv, count, handle = ours.dispatch()
    out = ours.combine(_scaled(recv), handle)
    ids = ours.ids.to(device)
    expected, expected_count, expected_handle, _, hook = world.reference.low_latency_dispatch(
        ours.x.to(device), ids, capacity, world.experts, use_fp8=False
    )
    hook()
    expected_out, _, hook = world.reference.low_latency_combine(
        _scaled(expected), ids, ours.topk_weights.to(device), expected_handle
    )
    hook()
    assert count.tolist() == expected_count.tolist(), "rows per expert"
    rows = _by_source(recv, count, handle)
    for expert, pair in enumerate(
        zip(rows, _by_source(expected, expected_count, expected_handle), strict=True)
    ):
        (source, row), (expected_source, expected_row) = pair
        assert source == expected_source, f"sources of expert {expert}"
        assert torch.equal(row, expected_row), f"rows of expert {expert}"
    # The same float32 sum in the same order; fused multiply-adds may move it by one rounding.
    torch.testing.assert_close(
        out.float().cpu(), expected_out.float().cpu(), rtol=2**-7, atol=2**-10
    )


def _scaled(recv: torch.Tensor) -> torch.Tensor:
    """Stands for the experts: each multiplies by a power of two of its own, exact anywhere."""
    factor = torch.tensor([2.0 ** (e % 3) for e in range(recv.shape[0])], device=recv.device)
    return (recv.float() * factor.view(-1, 1, 1)).to(recv.dtype)


def _by_source(
    recv: torch.Tensor, count: torch.Tensor, handle: tuple
) -> list[tuple[list[tuple[int, int]], torch.Tensor]]:
    """Per expert: (rank, token) of each received row and the rows, in that order."""
    src_info, layout_range = handle[0].cpu(), handle[1].cpu()
    rows, result = recv.cpu(), []
    for expert, total in enumerate(count.tolist()):
        sources = {}
        for rank, packed in enumerate(layout_range[expert].tolist()):
            begin, number = packed >> 32, packed & 0xFFFFFFFF
            for row in range(begin, begin + number):
                sources[rank, int(src_info[expert, row])] = row
        assert sorted(sources.values()) == list(range(total)), f"layout of expert {expert}"
        order = sorted(sources)
        result.append((order, rows[expert, [sources[key] for key in order]]))
    return result


def fp8_round_trip(world: World) -> None:
    """FP8 dispatch: rows come back within FP8's error; scales are float32, column-major."""
    ours = world.layer(world.case([world.sizes.capacity] * world.ranks, seed=5))
    (data, scale), _, handle = ours.dispatch(use_fp8=True)
    recv = (data.float() * scale.repeat_interleave(128, -1)).to(torch.bfloat16).contiguous()
    out = ours.combine(recv, handle).float()
    rows, groups = world.ranks * world.sizes.capacity, world.sizes.hidden // 128
    assert (data.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert scale.stride() == (groups * rows, 1, rows), scale.stride()
    weight = torch.where(ours.ids >= 0, ours.topk_weights, 0).sum(1, keepdim=True)
    expected = ours.x.float() * weight
    error = float((out - expected).norm() / expected.norm())
    assert error < 2**-4, f"relative error {error}"  # e4m3 keeps 3 bits of mantissa


def two_in_flight(world: World) -> None:
    """Two layers dispatched before the first combines: both get their own results."""
    capacity = world.sizes.capacity
    layers = [world.layer(world.case([capacity // 2] * world.ranks, seed=s)) for s in (7, 8)]
    sent = [each.dispatch() for each in layers]
    results = []
    for each, (recv, count, handle) in zip(layers, sent, strict=True):
        y = each.runner.run_experts(recv, None, count, each.experts, capacity // 4)
        results.append(each.combine(y, handle))
    for index, (each, out) in enumerate(zip(layers, results, strict=True)):
        each.check(out, f"layer {index}")


def poisoned_rows(world: World) -> None:
    """NaN in every row past the counts, before and after the experts, reaches no result."""
    ours = world.layer(world.case([min(5, world.sizes.capacity)] * world.ranks, seed=11))
    recv, count, handle = ours.dispatch()
    past = torch.arange(recv.shape[1], device=recv.device) >= count.unsqueeze(1)
    recv[past] = torch.nan
    y = ours.runner.run_experts(recv, None, count, ours.experts, 2)
    y[past] = torch.nan
    ours.check(ours.combine(y, handle))


def no_host_sync(world: World) -> None:
    """An eager forward never makes the host wait; torch raises if it does."""
    ours = world.layer(world.case([world.sizes.capacity] * world.ranks, seed=13))
    ours()  # kernels compiled, allocator warm
    with world.no_host_sync():
        out = ours()
    ours.check(out)


def graph(world: World) -> None:
    """Captured once; each replay follows the counts of its inputs, an idle rank's too."""
    tokens = [max(1, world.sizes.capacity // 4)] * world.ranks
    ours = world.layer(world.case(tokens, seed=20))
    out, replay = world.captured(ours)
    results = []
    for seed, routing in ((21, "random"), (22, "one"), (23, "none"), (24, "random")):
        other = world.layer(world.case(tokens, routing, seed))
        if seed == 24:  # in a graph a rank without tokens has only -1
            other.case.topk_ids[0].fill_(-1)
            other = world.layer(other.case)
        ours.load(other)
        replay()
        results.append((other, out.clone(), f"replay {seed}, {routing}"))
    for other, got, label in results:
        other.check(got, label)


def graphs_of_two_sizes(world: World) -> None:
    """Graphs of two batch sizes and eager calls take turns on one buffer."""
    capacity = world.sizes.capacity
    layers = [world.layer(world.case([n] * world.ranks, seed=n)) for n in (capacity, 1)]
    captured = [world.captured(each) for each in layers]
    eager = world.layer(world.case([capacity // 2] * world.ranks, seed=31))
    results = []
    for _ in range(3):
        for each, (out, replay) in zip(layers, captured, strict=True):
            replay()
            results += [(each, out.clone()), (eager, eager())]
    for index, (each, out) in enumerate(results):
        each.check(out, f"result {index}")


def soak(world: World) -> None:
    """Many round trips without a pause; the last result is right."""
    ours = world.layer(world.case(counts_of(world)["uneven"], seed=3))
    for _ in range(world.sizes.round_trips):
        out = ours()
    world.synchronise()
    ours.check(out, f"after {world.sizes.round_trips} round trips")


def same_bits(world: World) -> None:
    """With the same launch of the experts a token gets the same bits whatever else is in the batch,
    and whether a graph is replayed or not; where the layer is batch invariant, in batches of any
    size.

    Rows that route nowhere stand for those that a graph pads with.
    """
    counts = [world.sizes.capacity] * world.ranks
    live = max(1, world.sizes.capacity // 4)
    results = []
    for fp8 in (False, True):
        full, few = (world.layer(world.case(counts, seed=51), fp8) for _ in range(2))
        few.ids[live:] = -1
        out, replay = world.captured(few)
        replay()
        sent = [full(), few()]
        for each in (full, few):
            each.runner = make_moe_runner(
                replace(world.config, batch_invariant=True), world.device.type
            )
        for name in ("x", "ids", "topk_weights"):
            setattr(few, name, getattr(few, name)[:live])
        results.append(("fp8" if fp8 else "bf16", *sent, out, full(), few()))
    for kind, among, alone, replayed, large, small in results:
        for one, other in ((alone[:live], among[:live]), (replayed, alone), (small, large[:live])):
            _same(world, one, other, kind)
        assert not replayed[live:].any(), f"{kind}: rows that route nowhere"


def own_graphs(world: World) -> None:
    """Each rank replays a graph of its own size, runs eagerly or idles, whatever the others do; its
    results have the same bits in every such step, with batch invariance on and off."""
    capacity, rank = world.sizes.capacity, world.rank
    counts, live = [capacity] * world.ranks, max(1, world.sizes.capacity // 4)
    rng, results = random.Random(0), []
    for fp8, invariant in product((False, True), repeat=2):
        full, few, none, idle = (world.layer(world.case(counts, seed=61), fp8) for _ in range(4))
        config = replace(world.config, batch_invariant=invariant)
        for each, rows in ((full, capacity), (few, live), (none, live), (idle, 0)):
            each.runner = make_moe_runner(config, world.device.type)
            for name in ("x", "ids", "topk_weights"):
                setattr(each, name, getattr(each, name)[:rows])
        none.ids = torch.full_like(none.ids, -1)
        graphs = {name: world.captured(each) for name, each in
                  {"prefill": full, "decode": few, "idle": none}.items()}  # fmt: skip
        eager = {"eager prefill": full, "eager decode": few, "eager idle": idle}
        got: dict[str, list[torch.Tensor]] = {}
        for _ in range(OWN_STEPS):
            mode = [rng.choice([*graphs, *eager]) for _ in range(world.ranks)][rank]
            if mode in eager:
                out = eager[mode]()
            else:
                out, replay = graphs[mode]
                replay()
            got.setdefault(mode, []).append(out.clone())
        results.append((full, invariant, got))
    for full, invariant, got in results:
        for mode, outs in got.items():
            for out in outs[1:]:
                _same(world, out, outs[0], mode)
        for mode in {"prefill", "eager prefill"} & set(got):
            full.check(got[mode][0], mode)
        for mode in {"decode", "eager decode"} & set(got):
            for prefill in {"prefill", "eager prefill"} & set(got):
                rest = got[prefill][0]
                full.check(torch.cat([got[mode][0], rest[live:]]), mode)
                if invariant:
                    _same(world, got[mode][0], rest[:live], f"{mode} and {prefill}")
        assert not any(out.any() for mode in got if "idle" in mode for out in got[mode])


def _same(world: World, one: torch.Tensor, other: torch.Tensor, what: str) -> None:
    if world.device.type == "cuda":
        assert torch.equal(one, other), what
    else:  # a CPU's GEMM adds in an order that its size decides
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-8)


def buffer_bytes(world: World) -> None:
    """DeepEP's hint is what was planned; memory taken is at most planned.

    In a server it is also within one granule of it (server_checks); in a process that has done
    nothing else the fixed part is smaller. Needs the GPU for itself: what others take meanwhile
    counts as taken.
    """
    if world.hint is None or world.taken is None:
        return
    sizes = world.sizes
    asked = low_latency_rdma_bytes(sizes.capacity, sizes.hidden, world.ranks, world.experts)
    planned = device_bytes(asked)
    numbers = (
        f"asked {asked}, hint {world.hint}, planned {planned}, taken {world.taken} bytes per rank, "
        f"{world.ranks_per_device} rank(s) on this GPU"
    )
    print(f"rank {world.rank}: {numbers}", flush=True)
    assert world.hint == asked, numbers
    if world.ranks_per_device == 1:  # sharing a GPU is for tests only: nothing is planned for it
        assert world.taken <= planned, numbers


def workspace(world: World) -> None:
    """What an eager layer allocates at most, its weights and tokens apart, is what is planned.

    Within 5 % and what the allocator may add to each tensor; never more.
    """
    sizes = world.sizes
    for fp8 in (False, True):
        ours = world.layer(world.case([sizes.capacity] * world.ranks, seed=41), fp8)
        ours()  # what a first call alone needs
        peak = world.peak_bytes(ours)
        planned = workspace_bytes(
            world.experts, sizes.capacity, sizes.hidden, sizes.inter, "bfloat16",
            ranks=world.ranks, fp8=fp8,
        )  # fmt: skip
        numbers = f"peak {peak}, planned {planned} bytes, {'fp8' if fp8 else 'bf16'}"
        print(f"rank {world.rank}: {numbers}", flush=True)
        if peak is not None:
            assert peak <= planned <= 1.05 * peak + LARGE_TENSORS * UNSPLIT, numbers


CASES: dict[str, Case] = {
    "buffer bytes": buffer_bytes,
    "workspace": workspace,
    **{
        f"layer, {counts}, {routing}": partial(layer, counts=counts, routing=routing)
        for counts in ("T", "T-1", "uneven", "one idle", "all idle")
        for routing in ("random", "one")
    },
    "no expert": no_expert,
    "over capacity": over_capacity,
    **{
        f"against torch, {counts}, {routing}": partial(
            against_torch, counts=counts, routing=routing
        )
        for counts, routing in (("T", "random"), ("uneven", "one"), ("one idle", "random"))
    },
    "fp8 round trip": fp8_round_trip,
    "fp8 layer, T": partial(layer, counts="T", routing="random", fp8=True),
    "fp8 layer, one idle": partial(layer, counts="one idle", routing="one", fp8=True),
    "poisoned rows": poisoned_rows,
    "no host sync": no_host_sync,
    "graph": graph,
    "graphs of two sizes": graphs_of_two_sizes,
    "two in flight": two_in_flight,
    "same bits": same_bits,
    "own graphs": own_graphs,
    "soak": soak,
}
