"""One rank's view of a transport under test: what a case gets, on a GPU or on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_plugin.kernels.formats import BF16, FP8_BLOCK
from moe_plugin.kernels.weights import ExpertWeights
from moe_plugin.runtime.config import BatchedMoEConfig
from moe_plugin.runtime.runner import make_moe_runner
from moe_plugin.runtime.transports.torch_dist import TorchTransport

from ..support.moe_reference import Fp8Experts, MoECase, dense_moe, dense_moe_fp8, make_case

# Within this factor of the error of a dense layer that rounds to the same types.
ERROR_FACTOR = 4.0


@dataclass(frozen=True)
class Sizes:
    """How large the cases are.

    Attributes:
        capacity: T; FP8 dispatch needs ranks * T to be a multiple of 128.
        hidden: H; DeepEP knows a few values only, FP8 needs a multiple of 128.
        inter: I.
        experts: at least E, rounded up so that the ranks divide it.
        top_k: K.
        round_trips: of the soak.
    """

    capacity: int = 128
    hidden: int = 2048
    inter: int = 256
    experts: int = 16
    top_k: int = 4
    round_trips: int = 1000


@dataclass
class World:
    """A transport on this rank, and what to compare it with.

    Attributes:
        group: the ranks; gloo, so that Python objects travel without a GPU.
        transport: what is tested, guarded with T.
        device: where its tensors live.
        reference: the torch transport over the same ranks.
        reference_device: where the reference's tensors live.
        sizes: see :class:`Sizes`.
        ranks_per_device: ranks that share this rank's GPU.
        hint: DeepEP's size hint, bytes; None without a buffer.
        taken: free device memory that was lost while the buffer was created, bytes per rank.
    """

    group: dist.ProcessGroup
    transport: Any
    device: torch.device
    reference: TorchTransport
    reference_device: torch.device
    sizes: Sizes
    ranks_per_device: int = 1
    hint: int | None = None
    taken: int | None = None

    @property
    def rank(self) -> int:
        """Of the all-to-all group."""
        return int(self.group.rank())

    @property
    def ranks(self) -> int:
        """R."""
        return int(self.group.size())

    @property
    def experts(self) -> int:
        """E: a multiple of the ranks."""
        return -(-self.sizes.experts // self.ranks) * self.ranks

    @property
    def config(self) -> BatchedMoEConfig:
        """Of every layer in the cases."""
        return layer_config(self.sizes, self.ranks)

    def case(self, counts: list[int], routing: str = "random", seed: int = 0) -> MoECase:
        """The same random layer on every rank."""
        return make_case(
            counts,
            experts=self.experts,
            top_k=self.sizes.top_k,
            hidden=self.sizes.hidden,
            inter=self.sizes.inter,
            dtype=torch.bfloat16,
            routing=routing,
            seed=seed,
        )

    def layer(self, case: MoECase, fp8: bool = False) -> Layer:
        """This rank's part of a case."""
        return Layer(self, case, fp8)

    def synchronise(self) -> None:
        """Wait for the device; an error of an earlier kernel is raised here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self, step: Callable[[], torch.Tensor]) -> int | None:
        """The most that ``step`` allocated at once; None on CPU, where nobody counts."""
        if self.device.type != "cuda":
            step()
            return None
        self.synchronise()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        self.synchronise()
        return torch.cuda.max_memory_allocated() - before

    @contextlib.contextmanager
    def no_host_sync(self) -> Iterator[None]:
        """Torch raises at whatever would make the host wait for the GPU."""
        if self.device.type != "cuda":
            yield
            return
        self.synchronise()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def captured(self, step: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Callable[[], None]]:
        """``step`` as a CUDA graph: its output and what replays it; on CPU, repeated calls.

        Any host synchronisation makes the capture fail. ``step`` must make an even number of
        low-latency calls: each flips DeepEP's double buffer, and the capture bakes it in.
        """
        if self.device.type != "cuda":
            out = step().clone()

            def again() -> None:
                out.copy_(step())

            return out, again
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            step()
        torch.cuda.current_stream().wait_stream(warm)
        self.synchronise()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return out, replay

    def barrier(self) -> None:
        """Of the hosts."""
        dist.barrier(self.group)

    def destroy(self) -> None:
        """Release the buffer, on all ranks together."""
        self.synchronise()
        self.barrier()
        self.transport.destroy()
        self.synchronise()


def layer_config(sizes: Sizes, ranks: int) -> BatchedMoEConfig:
    """The layer of a world of these sizes."""
    return BatchedMoEConfig(
        num_experts=-(-sizes.experts // ranks) * ranks,
        num_ranks=ranks,
        top_k=sizes.top_k,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inter,
        max_num_tokens=sizes.capacity,
    )


class Layer:
    """One MoE layer of a case on this rank, on the world's device."""

    def __init__(self, world: World, case: MoECase, fp8: bool) -> None:
        self.world, self.case, self.fp8 = world, case, fp8
        rank, ranks, device = world.rank, world.ranks, world.device
        local = world.experts // ranks
        mine = slice(rank * local, (rank + 1) * local)
        self.runner = make_moe_runner(world.config, device.type)
        self.x = case.tokens[rank].to(device).contiguous()
        self.ids = case.topk_ids[rank].to(device).contiguous()
        self.topk_weights = case.topk_weights[rank].to(device).contiguous()
        if fp8:
            q = Fp8Experts.of(case)
            self.case = q.dequantised(case)
            parts: tuple[torch.Tensor, ...] = (q.w13, q.w2, q.w13_scale, q.w2_scale)
        else:
            parts = (case.w13, case.w2)
        tensors = (part[mine].to(device).contiguous() for part in parts)
        self.experts = ExpertWeights(*tensors, format=FP8_BLOCK if fp8 else BF16)

    def __call__(self) -> torch.Tensor:
        """The layer's output for this rank's tokens."""
        return self.runner.forward(
            self.world.transport, self.x, self.ids, self.topk_weights, self.experts
        )

    def load(self, other: Layer) -> None:
        """Take over another layer's inputs and weights, in place."""
        for name in ("x", "ids", "topk_weights"):
            getattr(self, name).copy_(getattr(other, name))
        self.experts.w13.copy_(other.experts.w13)
        self.experts.w2.copy_(other.experts.w2)

    def dispatch(self, use_fp8: bool = False) -> tuple[Any, torch.Tensor, Any]:
        """Send and receive: ``(recv, count, handle)``.

        The receive comes at once: a rank's next send clears the arrival counters of the other
        buffer, so that a send in between would lose them and the receive would wait for ever.
        """
        sizes = self.world.sizes
        recv, count, handle, _, hook = self.world.transport.low_latency_dispatch(
            self.x,
            self.ids,
            sizes.capacity,
            self.world.experts,
            use_fp8=use_fp8,
            return_recv_hook=True,
        )
        hook()
        return recv, count, handle

    def combine(self, y: torch.Tensor, handle: Any) -> torch.Tensor:
        """Send back, receive and reduce."""
        out, _, hook = self.world.transport.low_latency_combine(
            y, self.ids, self.topk_weights, handle, return_recv_hook=True
        )
        hook()
        return out

    def check(self, got: torch.Tensor, label: str = "") -> None:
        """Against a dense layer in float64, bounded by one that rounds as ours does."""
        rank = self.world.rank
        exact = dense_moe(self.case, rank)
        if self.fp8:
            same = dense_moe_fp8(self.case, rank).double()
        else:
            same = dense_moe(self.case, rank, torch.bfloat16).double()
        assert got.shape == exact.shape, f"{label}: {got.shape}, not {exact.shape}"
        assert got.dtype == torch.bfloat16, f"{label}: {got.dtype}"
        if not exact.numel():
            return
        floor = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        bound = ERROR_FACTOR * max((same - exact).abs().max(), floor)
        error = (got.double().cpu() - exact).abs().max()
        assert error <= bound, f"{label}: error {error:.3e}, bound {bound:.3e}"
