"""One rank's MoE layer, whole and in pieces, ready to be timed."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from shapes import Shape

from moe_plugin.kernels.formats import BF16, FP8_BLOCK
from moe_plugin.kernels.weights import ExpertWeights
from moe_plugin.runtime.config import BatchedMoEConfig
from moe_plugin.runtime.runner import make_moe_runner, warm_up
from moe_plugin.runtime.stats import Stats
from moe_plugin.runtime.transports.guarded import GuardedTransport
from moe_plugin.runtime.transports.torch_dist import TorchTransport
from tests.support.kernel_cases import make_weights


class Pieces:
    """Dispatch, experts and combine of one layer on this rank.

    Args:
        group: the hosts' gloo group over all ranks.
        shape: the layer.
        transport: ``deepep`` or ``torch``; the latter over NCCL where each rank has a GPU.
        device: of this rank.
    """

    def __init__(
        self, group: dist.ProcessGroup, shape: Shape, transport: str, device: torch.device
    ) -> None:
        self.group, self.shape, self.device = group, shape, device
        self.config = BatchedMoEConfig(
            num_experts=shape.experts,
            num_ranks=group.size(),
            top_k=shape.top_k,
            hidden_size=shape.hidden,
            intermediate_size=shape.inter,
            max_num_tokens=shape.capacity,
        )
        self.format = FP8_BLOCK if shape.fp8 else BF16
        if device.type == "cuda":
            torch.cuda.set_device(device)
            warm_up(self.config, self.format)
        inner = self._create(transport)
        self.transport = GuardedTransport(inner, shape.capacity, stats=Stats())
        self.runner = make_moe_runner(self.config, device.type)
        self.weights = self._weights()

    def _create(self, transport: str) -> Any:
        if transport == "deepep":
            from moe_plugin.runtime.transports.deepep_ll import create_deepep_buffer

            return create_deepep_buffer(
                self.group,
                max_num_tokens=self.shape.capacity,
                hidden_size=self.shape.hidden,
                num_experts=self.shape.experts,
                qp_depth=max(1024, 2 * (self.shape.capacity + 1)),
            )
        own_gpu = self.device.type == "cuda" and self.group.size() <= torch.cuda.device_count()
        return TorchTransport(dist.new_group(backend="nccl") if own_gpu else self.group)

    def _weights(self) -> ExpertWeights:
        shape, local = self.shape, self.config.num_local_experts
        generator = torch.Generator(device=self.device).manual_seed(self.group.rank())
        return make_weights(local, shape.hidden, shape.inter, self.format, generator)

    def load(self, tokens: int) -> None:
        """Random tokens with uniform routing; one dispatch's output for the pieces after it."""
        shape, seed = self.shape, self.group.rank() * 1000 + tokens
        generator = torch.Generator(device=self.device).manual_seed(seed)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        self.x = torch.randn(tokens, shape.hidden, **options).bfloat16()
        scores = torch.rand(tokens, shape.experts, **options)
        self.ids = scores.argsort(1)[:, : shape.top_k].contiguous()
        self.topk_weights = torch.rand(tokens, shape.top_k, **options)
        mean = -(-tokens * self.group.size() * shape.top_k // shape.experts)
        self.expected_m = max(1, mean)
        self.dispatch()  # with the next one an even number: see timing.seconds_of
        recv, self.count, self.handle = self.dispatch()
        self.recv, self.scale = recv if isinstance(recv, tuple) else (recv, None)
        self.y = self.recv
        if self.scale is not None:
            wide = self.scale.repeat_interleave(128, -1)
            self.y = (self.recv.float() * wide).bfloat16().contiguous()
        self._check()

    def _check(self) -> None:
        """Nothing is timed before it is right: rows that come back unchanged, weighted and summed.

        Two combines, so that an even number of calls has been made.
        """
        self.combine()
        got = self.combine().float()
        expected = self.x.float() * self.topk_weights.sum(1, keepdim=True)
        error = float((got - expected).norm() / expected.norm())
        bound = 2**-4 if self.shape.fp8 else 2**-7
        assert error < bound, f"{self.shape.name}, {len(self.x)} tokens: error {error}"

    def dispatch(self) -> tuple[Any, torch.Tensor, Any]:
        """Send and receive."""
        recv, count, handle, _, hook = self.transport.low_latency_dispatch(
            self.x,
            self.ids,
            self.shape.capacity,
            self.shape.experts,
            use_fp8=self.shape.fp8,
            return_recv_hook=True,
        )
        hook()
        return recv, count, handle

    def experts(self) -> torch.Tensor:
        """On the output of the dispatch that ``load`` made."""
        return self.runner.run_experts(
            self.recv, self.scale, self.count, self.weights, self.expected_m
        )

    def combine(self) -> torch.Tensor:
        """Send back, receive and reduce."""
        out, _, hook = self.transport.low_latency_combine(
            self.y, self.ids, self.topk_weights, self.handle, return_recv_hook=True
        )
        hook()
        return out

    def layer(self) -> torch.Tensor:
        """All of it, as the plugin runs it."""
        return self.runner.forward(
            self.transport, self.x, self.ids, self.topk_weights, self.weights
        )

    def destroy(self) -> None:
        """Release the buffer, on all ranks together."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(self.group)
        self.transport.destroy()


def device_of_rank(rank: int, ranks: int, cpu: bool) -> torch.device:
    """Rank r uses GPU r modulo their number; several ranks on one GPU are correct and slow."""
    if cpu:
        return torch.device("cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    return torch.device("cuda", rank % torch.cuda.device_count())
