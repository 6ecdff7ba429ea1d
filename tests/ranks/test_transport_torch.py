"""The torch transport keeps DeepEP's contract on 1, 2 and 4 ranks."""

from __future__ import annotations

import pytest
import torch

from moe_plugin.errors import BudgetError, UnsupportedError
from moe_plugin.kernels.weights import ExpertWeights
from moe_plugin.runtime.config import BatchedMoEConfig
from moe_plugin.runtime.metadata import DPMetadata
from moe_plugin.runtime.runner import make_moe_runner
from moe_plugin.runtime.stats import Stats
from moe_plugin.runtime.transports.guarded import GuardedTransport
from moe_plugin.runtime.transports.torch_dist import TorchTransport

from ..support.moe_reference import MoECase, dense_moe, make_case
from ..support.ranks import run_ranks

CAPACITY = 8
# Error of the same layer computed densely in the payload's dtype, times this factor.
ERROR_FACTOR = 4.0

COUNTS = {
    "full": lambda ranks: [CAPACITY] * ranks,
    "uneven": lambda ranks: [(3 * rank + 1) % (CAPACITY + 1) for rank in range(ranks)],
    "one-rank-idle": lambda ranks: [0] + [5] * (ranks - 1) if ranks > 1 else [5],
    "all-idle": lambda ranks: [0] * ranks,
}


def _layer(group, case: MoECase, capacity: int):
    """One MoE layer through transport and runner on this rank, with everything it returned."""
    rank, ranks = group.rank(), group.size()
    experts = case.w13.shape[0]
    mine = slice(rank * experts // ranks, (rank + 1) * experts // ranks)
    config = BatchedMoEConfig(
        num_experts=experts,
        num_ranks=ranks,
        top_k=case.topk_ids[rank].shape[1],
        hidden_size=case.w13.shape[2],
        intermediate_size=case.w2.shape[2],
        max_num_tokens=capacity,
    )
    return make_moe_runner(config, "cpu").forward(
        GuardedTransport(TorchTransport(group), capacity),
        case.tokens[rank],
        case.topk_ids[rank],
        case.topk_weights[rank],
        ExpertWeights(case.w13[mine], case.w2[mine]),
        metadata=DPMetadata(tuple(len(t) for t in case.tokens)),
    )


def _check_layers(group) -> None:
    ranks = group.size()
    for dtype in (torch.float32, torch.bfloat16):
        for name, counts in COUNTS.items():
            for routing in ("random", "one"):
                case = make_case(counts(ranks), dtype=dtype, routing=routing, seed=ranks)
                got = _layer(group, case, CAPACITY).double()
                exact = dense_moe(case, group.rank())
                same = dense_moe(case, group.rank(), dtype).double()
                assert got.shape == exact.shape
                assert not got.isnan().any(), (name, routing, dtype)
                if not exact.numel():
                    continue
                floor = torch.finfo(dtype).eps * exact.abs().max()
                bound = ERROR_FACTOR * max((same - exact).abs().max(), floor)
                error = (got - exact).abs().max()
                assert error <= bound, f"{name} {routing} {dtype}: {error} > {bound}"


def _check_layout(group) -> None:
    """Counts, row order, NaN past the counts and the handle, against a plain Python loop."""
    rank, ranks, experts = group.rank(), group.size(), 8
    case = make_case([(5 * r + 3) % (CAPACITY + 1) for r in range(ranks)], experts=experts)
    transport = TorchTransport(group)
    recv, count, handle, _, hook = transport.low_latency_dispatch(
        case.tokens[rank], case.topk_ids[rank], CAPACITY, experts, use_fp8=False
    )
    hook()
    local = experts // ranks
    assert recv.shape == (local, ranks * CAPACITY, 32)
    assert count.dtype == torch.int32
    for e in range(local):
        row = 0
        for source in range(ranks):
            begin = row
            for token, ids in enumerate(case.topk_ids[source].tolist()):
                if rank * local + e in ids:
                    assert torch.equal(recv[e, row], case.tokens[source][token])
                    assert handle.src_info[e, row] == token
                    row += 1
            packed = int(handle.layout_range[e, source])
            assert (packed >> 32, packed & 0xFFFFFFFF) == (begin, row - begin)
        assert count[e] == row
        assert recv[e, row:].isnan().all()


def _check_refusals(group) -> list[str]:
    transport = TorchTransport(group)
    x = torch.zeros(CAPACITY + 1, 32)
    ids = torch.zeros(CAPACITY + 1, 2, dtype=torch.int64)
    messages = []
    for options, rows in (({"use_fp8": False}, CAPACITY + 1), ({"use_fp8": True}, 1)):
        with pytest.raises((BudgetError, UnsupportedError)) as caught:
            transport.low_latency_dispatch(x[:rows], ids[:rows], CAPACITY, 8, **options)
        messages.append(str(caught.value))
    with pytest.raises(UnsupportedError, match=r"torch\.int64"):
        transport.low_latency_dispatch(x[:1], ids[:1].int(), CAPACITY, 8, use_fp8=False)
    return messages


def _everything(group) -> list[str]:
    _check_layers(group)
    _check_layout(group)
    return _check_refusals(group)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_torch_transport(ranks: int) -> None:
    """Dense MoE reference, layout and refusals; one set of processes per number of ranks."""
    for over, fp8 in run_ranks(ranks, _everything):
        assert f"{CAPACITY + 1} tokens" in over
        assert "--use-batched-dp-moe on" in over
        assert "--deepep-dispatcher-output-dtype bf16" in fp8


class _Recorder:
    """A transport that only notes that it was reached."""

    group_size = 2
    low_latency_mode = True

    def __init__(self) -> None:
        self.calls = 0

    def low_latency_dispatch(self, *args, **options):
        self.calls += 1


def test_guard_refuses_before_the_inner_transport_is_reached() -> None:
    """T rows pass, T + 1 raise one error with got, limit and fix; nothing is sent."""
    inner, stats = _Recorder(), Stats()
    guard = GuardedTransport(inner, CAPACITY, mode=lambda: "decode", stats=stats)
    guard.low_latency_dispatch(torch.zeros(CAPACITY, 4), None, CAPACITY, 8)
    with pytest.raises(BudgetError, match=rf"got {CAPACITY + 1} on this rank, allowed <= 8\. Fix"):
        guard.low_latency_dispatch(torch.zeros(CAPACITY + 1, 4), None, CAPACITY, 8)
    assert inner.calls == 1
    assert stats.as_dict()["max_rows"] == {"decode": CAPACITY}
    assert guard.group_size == 2


def test_guard_raises_on_every_rank_when_one_rank_is_over() -> None:
    """A rank inside its budget must not wait for a peer that is not."""
    metadata = DPMetadata((2, CAPACITY + 3))
    guard = GuardedTransport(_Recorder(), CAPACITY, metadata=lambda: metadata, stats=Stats())
    with pytest.raises(BudgetError, match="on the busiest rank"):
        guard.low_latency_dispatch(torch.zeros(2, 4), None, CAPACITY, 8)
