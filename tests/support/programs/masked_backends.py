"""The host's own dispatchers of four backends, over stand-ins for their libraries, on one CPU rank.

Rows go through the host's dispatcher, our experts and the host's combine; then more rows than T
are offered, and the buffer is created as a scheduler would create it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from program_io import emit
from sglang.srt.layers.moe.token_dispatcher import deepep_v2, mooncake, nixl, pplx
from sglang.srt.layers.moe.utils import DeepEPMode, DispatcherOutputDtype
from sglang.srt.runtime_context import get_resources
from support.moe_reference import Fp8Experts, MoECase, dense_moe, dense_moe_fp8, make_case

from moe_plugin.batched_backend import Capability
from moe_plugin.integration.host_checks import check_symbol
from moe_plugin.integration.scheduler_symbols import DISPATCHERS
from moe_plugin.integration.serve import buffer, dispatchers, moe_layer, process
from moe_plugin.kernels.experts_torch import quantise_groups_torch
from moe_plugin.planning.plan import Plan
from moe_plugin.runtime.config import BatchedMoEConfig
from moe_plugin.runtime.runner import make_moe_runner
from moe_plugin.runtime.transports.torch_dist import TorchTransport

CAPACITY, ROWS, EXPERTS, TOP_K, HIDDEN, INTER = 8, 7, 8, 3, 256, 128
ERROR_FACTOR = 4.0


class Library:
    """What both libraries' ``Buffer`` have in common: DeepEP's layout, here over gloo."""

    made = sent = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        Library.made += 1
        self.group_size = 1
        self.transport = TorchTransport(dist.group.WORLD)

    @staticmethod
    def size_hint(*_: Any) -> int:
        return 0

    get_rdma_size_hint = get_ep_buffer_size_hint = size_hint

    def nothing(self, *_: Any, **__: Any) -> None:
        pass

    update_memory_buffers = set_tcp_store_group = connect_ranks = nothing

    def send(self, x: torch.Tensor, ids: torch.Tensor, *, use_fp8: bool) -> tuple[Any, ...]:
        Library.sent += 1
        recv, *rest = self.transport.low_latency_dispatch(x, ids, CAPACITY, EXPERTS, use_fp8=False)
        if not use_fp8:
            return recv, *rest
        data, scales = quantise_groups_torch(recv)
        return (data, scales.transpose(1, 2).contiguous().transpose(1, 2)), *rest


class Nixl(Library):
    def dispatch(self, x: Any, ids: Any, tokens: int, experts: int, **options: Any) -> Any:
        assert (tokens, experts) == (CAPACITY, EXPERTS)
        return self.send(x, ids, use_fp8=options["use_fp8"])

    def combine(self, x: Any, topk_idx: Any, topk_weights: Any, handle: Any, **_: Any) -> Any:
        return self.transport.low_latency_combine(x, topk_idx, topk_weights, handle)


class Mooncake(Library):
    def dispatch(
        self, x: Any, ids: Any, ranks: Any, tokens: int, experts: int, timeout: int, **options: Any
    ) -> Any:
        assert (tokens, experts) == (CAPACITY, EXPERTS)
        return self.send(x, ids, use_fp8=options["use_fp8"])

    def combine(
        self, x: Any, ids: Any, weights: Any, ranks: Any, timeout: int, handle: Any, **_: Any
    ) -> Any:
        return self.transport.low_latency_combine(x, ids, weights, handle)


def stand_in() -> None:
    """Libraries, and what a running host would have published."""
    sys.modules["nixl_ep"] = module = ModuleType("nixl_ep")
    module.Buffer = Nixl
    sys.modules["mooncake"] = ModuleType("mooncake")
    sys.modules["mooncake.mooncake_ep_buffer"] = module = ModuleType("mooncake_ep_buffer")
    module.Buffer = Mooncake
    parallel = SimpleNamespace(max_ep_size=None, attn_dp_size=2, attn_tp_size=1)
    nixl.get_parallel = pplx.get_parallel = lambda: parallel
    nixl.get_global_tcp_store = lambda: "store"
    mooncake._MooncakeEPDispatcherImpl._get_active_ranks = lambda self: None
    pplx.use_pplx = True
    pplx.get_deepep_output_dtype = lambda _: DispatcherOutputDtype.BF16
    process.current_metadata = lambda: None
    process.current_mode = lambda: "decode"


def plan(backend: str) -> Plan:
    made = Plan(
        capability=Capability(True, "", backend=backend), max_dispatch_tokens_per_rank=CAPACITY
    )
    process.current_plan = lambda: made
    process.joins_serving_ranks = lambda: False
    return made


def dispatcher(backend: str) -> Any:
    """The host's, as its layers build it."""
    common: dict[str, Any] = {
        "group": dist.group.WORLD,
        "router_topk": TOP_K,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "hidden_size": HIDDEN,
        "params_dtype": torch.bfloat16,
    }
    if backend == "deepep_v2":
        return deepep_v2.DeepEPv2Dispatcher(**common, use_fp8_dispatch=False)
    made = {
        "nixl": nixl.NixlEPDispatcher,
        "mooncake": mooncake.MooncakeEPDispatcher,
        "pplx": pplx.PplxDispatcher,
    }[backend]
    return made(**common, deepep_mode=DeepEPMode.LOW_LATENCY, return_recv_hook=True)


def layer(backend: str) -> Any:
    made = dispatcher(backend)
    outer = made if backend == "deepep_v2" else SimpleNamespace(_inners=[made])
    runner = SimpleNamespace(activation="silu")
    return SimpleNamespace(
        layer_id=0, dispatcher=outer, quant_config=None, moe_runner_config=runner
    )


def topk(case: MoECase, rows: int = ROWS) -> Any:
    return SimpleNamespace(topk_ids=case.topk_ids[0][:rows], topk_weights=case.topk_weights[0])


def layer_error(backend: str, *, fp8: bool) -> float:
    """Error of dispatch, our experts and combine, over that of the same layer in the same dtype."""
    case = make_case(
        [ROWS], experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, inter=INTER, dtype=torch.bfloat16
    )
    made = layer(backend)
    dispatchers.guard_dispatchers(made.dispatcher, plan(backend), backend)
    config = BatchedMoEConfig(
        num_experts=EXPERTS,
        num_ranks=1,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        max_num_tokens=CAPACITY,
    )
    setattr(made, moe_layer._RUNNER, make_moe_runner(config, "cpu"))
    made.w13_weight, made.w2_weight = case.w13, case.w2
    if fp8:
        experts = Fp8Experts.of(case)
        made.quant_config = "fp8"
        made.w13_weight, made.w2_weight = experts.w13, experts.w2
        made.w13_weight_scale_inv, made.w2_weight_scale_inv = experts.w13_scale, experts.w2_scale
        case = experts.dequantised(case)
        same = dense_moe_fp8(case, 0)
    else:
        same = dense_moe(case, 0, torch.bfloat16)
    exact = dense_moe(case, 0)
    inner = made.dispatcher._inners[0]
    output = inner.dispatch(case.tokens[0], topk(case))
    assert output.format.is_deepep_ll()
    combine = moe_layer.around_run_moe_core(None, made, output)
    got = inner.combine(combine)
    assert got.shape == exact.shape
    floor = torch.finfo(torch.bfloat16).eps * exact.abs().max()
    bound = ERROR_FACTOR * max((same.double() - exact).abs().max(), floor)
    return float((got.double() - exact).abs().max() / bound)


def refused(call: Callable[[], Any]) -> str:
    before = Library.sent
    try:
        call()
    except Exception as error:
        assert Library.sent == before, "something was sent"
        return f"{type(error).__name__}: {error}"
    return "not refused"


def refusals(backend: str) -> dict[str, str]:
    """More rows than T, by both ways into the dispatcher; a dispatcher of another T."""
    case = make_case([CAPACITY + 1], experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
    made = layer(backend)
    dispatchers.guard_dispatchers(made.dispatcher, plan(backend), backend)
    inner = getattr(made.dispatcher, "_inners", [made.dispatcher])[0]
    offered = {"hidden_states": case.tokens[0], "topk_output": topk(case, CAPACITY + 1)}
    answers = {"dispatch": refused(lambda: inner.dispatch(**offered))}
    if hasattr(inner, "dispatch_a"):  # as two-batch overlap calls it; the stage did not move
        answers["dispatch_a"] = refused(lambda: inner.dispatch_a(**offered))
    other = Plan(capability=Capability(True, "", backend=backend), max_dispatch_tokens_per_rank=64)
    answers["plan"] = refused(
        lambda: dispatchers.guard_dispatchers(made.dispatcher, other, backend)
    )
    return answers


def buffers_made(backend: str) -> list[int]:
    """How many there are after two layers have been built, and once the KV cache is there."""
    get_resources().buffers.clear()  # of the layers above
    buffer._cpu_group = lambda: dist.group.WORLD
    plan(backend)
    counts = [-Library.made, -Library.made]
    for _ in range(2):
        buffer.announce(layer(backend).dispatcher)
    counts[0] += Library.made
    buffer.after_memory_pools(None, None)
    counts[1] += Library.made
    return counts


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)
        stand_in()
        errors = {"mooncake fp8": layer_error("mooncake", fp8=True)}
        for name, fp8 in (("nixl bf16", False), ("nixl fp8", True)):
            with nixl.envs.SGLANG_NIXL_EP_BF16_DISPATCH.override(not fp8):
                errors[name] = layer_error("nixl", fp8=fp8)
        assert not [text for symbol in DISPATCHERS.values() if (text := check_symbol(symbol))]
        answers = {backend: refusals(backend) for backend in DISPATCHERS}
        made = {backend: buffers_made(backend) for backend in ("nixl", "mooncake", "pplx")}
        emit({"errors": errors, "refusals": answers, "buffers": made})
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
