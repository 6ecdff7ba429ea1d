"""Real DeepEP low latency: transport, runner on its output, graphs. One or two ranks on a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from moe_plugin.config import BatchedMoEConfig
from moe_plugin.deepep_limits import low_latency_rdma_bytes
from moe_plugin.errors import BudgetError
from moe_plugin.runner import ExpertWeights, make_moe_runner
from moe_plugin.stats import Stats
from moe_plugin.transports.guard import GuardedTransport

from ..moe_reference import MoECase, dense_moe, make_case
from ..ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="requires an NVIDIA GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec("deep_ep") is None, reason="requires the deep_ep package"
    ),
]

CAPACITY, HIDDEN, INTER, EXPERTS, TOP_K = 64, 2048, 256, 16, 4
# bf16 in and out, sums in fp32: within this factor of a dense layer computed in bf16.
ERROR_FACTOR = 4.0
ROUND_TRIPS = {1: 1000, 2: 50}  # two ranks on one GPU take turns: about 5 ms each


def _case(counts: list[int], routing: str = "random", seed: int = 0) -> MoECase:
    return make_case(
        counts,
        experts=EXPERTS,
        top_k=TOP_K,
        hidden=HIDDEN,
        inter=INTER,
        dtype=torch.bfloat16,
        routing=routing,
        seed=seed,
    )


def _config(ranks: int) -> BatchedMoEConfig:
    return BatchedMoEConfig(
        num_experts=EXPERTS,
        num_ranks=ranks,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        max_num_tokens=CAPACITY,
    )


class _Layer:
    """One MoE layer of a case on this rank, on the GPU."""

    def __init__(self, group: Any, transport: Any, case: MoECase) -> None:
        rank, ranks = group.rank(), group.size()
        mine = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
        self.runner = make_moe_runner(_config(ranks), "cuda")
        self.transport = transport
        self.x = case.tokens[rank].cuda().contiguous()
        self.ids = case.topk_ids[rank].cuda()
        self.topk_weights = case.topk_weights[rank].cuda()
        self.experts = ExpertWeights(case.w13[mine].cuda(), case.w2[mine].cuda())
        self.case, self.rank = case, rank

    def __call__(self) -> torch.Tensor:
        return self.runner.forward(
            self.transport, self.x, self.ids, self.topk_weights, self.experts
        )

    def check(self, got: torch.Tensor, label: str) -> None:
        exact = dense_moe(self.case, self.rank)
        same = dense_moe(self.case, self.rank, torch.bfloat16).double()
        assert got.shape == exact.shape, label
        if not exact.numel():
            return
        floor = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        bound = ERROR_FACTOR * max((same - exact).abs().max(), floor)
        error = (got.double().cpu() - exact).abs().max()
        assert error <= bound, f"{label}: {error} > {bound}"


def _counts(ranks: int) -> dict[str, list[int]]:
    return {
        "T": [CAPACITY] * ranks,
        "T-1": [CAPACITY - 1] * ranks,
        "uneven": [(31 * rank + 7) % CAPACITY for rank in range(ranks)],
        "one idle": [0] + [9] * (ranks - 1),
    }


def _fp8_round_trip(group: Any, transport: Any) -> None:
    """FP8 dispatch: dequantised rows come back within FP8's error; scales are column-major."""
    case = _case([CAPACITY] * group.size(), seed=5)
    rank = group.rank()
    x, ids = case.tokens[rank].cuda(), case.topk_ids[rank].cuda()
    (data, scale), _, handle, _, hook = transport.low_latency_dispatch(
        x, ids, CAPACITY, EXPERTS, use_fp8=True, return_recv_hook=True
    )
    hook()
    rows = group.size() * CAPACITY
    assert scale.stride() == (HIDDEN // 128 * rows, 1, rows)
    recv = (data.float() * scale.repeat_interleave(128, -1)).to(torch.bfloat16)
    weights = case.topk_weights[rank].cuda()
    out, _, hook = transport.low_latency_combine(recv, ids, weights, handle, return_recv_hook=True)
    hook()
    expected = x.float() * torch.where(ids >= 0, weights, 0).sum(1, keepdim=True)
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 2**-4, error  # e4m3 keeps 3 bits of mantissa


def _two_in_flight(group: Any, transport: Any) -> None:
    """DeepEP holds two dispatches; both combine to their own layer's result."""
    cases = [_case([CAPACITY // 2] * group.size(), seed=seed) for seed in (7, 8)]
    layers = [_Layer(group, transport, case) for case in cases]
    sent = []
    for layer in layers:
        recv, count, handle, _, hook = transport.low_latency_dispatch(
            layer.x, layer.ids, CAPACITY, EXPERTS, use_fp8=False, return_recv_hook=True
        )
        sent.append((recv, count, handle, hook))
    for layer, (recv, count, handle, hook) in zip(layers, sent, strict=True):
        hook()
        y = layer.runner.run_experts(recv, None, count, layer.experts, 8)
        out, _, hook = transport.low_latency_combine(
            y, layer.ids, layer.topk_weights, handle, return_recv_hook=True
        )
        hook()
        layer.check(out, "two in flight")


def _poisoned_rows(group: Any, transport: Any) -> None:
    """NaN in every row past the counts reaches no result."""
    layer = _Layer(group, transport, _case([5] * group.size(), seed=11))
    recv, count, handle, _, hook = transport.low_latency_dispatch(
        layer.x, layer.ids, CAPACITY, EXPERTS, use_fp8=False, return_recv_hook=True
    )
    hook()
    past = torch.arange(recv.shape[1], device="cuda") >= count.unsqueeze(1)
    recv[past] = torch.nan
    y = layer.runner.run_experts(recv, None, count, layer.experts, 2)
    y[past] = torch.nan
    out, _, hook = transport.low_latency_combine(
        y, layer.ids, layer.topk_weights, handle, return_recv_hook=True
    )
    hook()
    layer.check(out, "poisoned")


def _graph(group: Any, transport: Any) -> None:
    """Capture would fail at any host synchronisation; replay follows changed counts."""
    layer = _Layer(group, transport, _case([16], seed=20))
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        for _ in range(2):
            layer()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer()  # an even number of calls: each flips DeepEP's double buffer
        out = layer()
    for seed, routing in ((21, "random"), (22, "one"), (23, "random")):
        other = _Layer(group, transport, _case([16], routing, seed))
        for name in ("x", "ids", "topk_weights"):
            getattr(layer, name).copy_(getattr(other, name))
        layer.experts.w13.copy_(other.experts.w13)
        layer.experts.w2.copy_(other.experts.w2)
        graph.replay()
        torch.cuda.synchronize()
        other.check(out, f"replay {seed}")


def _everything(group: Any) -> dict[str, Any]:
    from moe_plugin.transports.deepep_ll import create_deepep_buffer

    torch.cuda.set_device(0)
    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    free_before = torch.cuda.mem_get_info()[0]
    buffer = create_deepep_buffer(
        group,
        max_num_tokens=CAPACITY,
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        qp_depth=max(1024, 2 * (CAPACITY + 1)),
    )
    torch.cuda.synchronize()
    taken = free_before - torch.cuda.mem_get_info()[0]
    hint = buffer.get_low_latency_rdma_size_hint(CAPACITY, HIDDEN, group.size(), EXPERTS)
    transport = GuardedTransport(buffer, CAPACITY, stats=Stats())
    for name, counts in _counts(group.size()).items():
        for routing in ("random", "one"):
            layer = _Layer(group, transport, _case(counts, routing, seed=len(name)))
            layer.check(layer(), f"{name} {routing}")
    with pytest.raises(BudgetError, match=f"got {CAPACITY + 1} on this rank"):
        _Layer(group, transport, _case([CAPACITY + 1] * group.size()))()
    _fp8_round_trip(group, transport)
    _two_in_flight(group, transport)
    _poisoned_rows(group, transport)
    if group.size() == 1:
        _graph(group, transport)
    layer = _Layer(group, transport, _case([CAPACITY] * group.size(), seed=3))
    for _ in range(ROUND_TRIPS[group.size()]):
        out = layer()
    torch.cuda.synchronize()
    layer.check(out, "after the soak")
    buffer.destroy()
    return {"hint": hint, "taken": taken}


@pytest.mark.parametrize("ranks", [1, 2])
def test_deepep_low_latency(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a dense reference: every count, both dtypes, T + 1, graphs, a soak, a clean end."""
    monkeypatch.setenv("EP_SUPPRESS_NCCL_CHECK", "1")
    monkeypatch.setenv("NVSHMEM_REMOTE_TRANSPORT", "none")
    planned = low_latency_rdma_bytes(CAPACITY, HIDDEN, ranks, EXPERTS)
    for result in run_ranks(ranks, _everything):
        assert result["hint"] == planned
        print(f"{ranks} ranks: hint {planned} bytes, device lost {result['taken']} bytes")
