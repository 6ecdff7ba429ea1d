"""The MoE runner: dispatch -> experts -> combine, once per layer. There is no chunk loop.

The batch always fits, because the budgets were planned from the same capacity; a batch that does
not is an error (see :mod:`moe_plugin.runtime.transports.guarded`), never a second round.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from ..kernels.formats import SWIGLU, Activation, Format
from ..kernels.launch import Shape
from ..kernels.weights import ExpertWeights
from .config import BatchedMoEConfig
from .metadata import DPMetadata, rows_to_launch_for

if TYPE_CHECKING:
    import torch

    from .transports.base import Transport

    Experts = Callable[..., torch.Tensor]

logger = logging.getLogger(__name__)


class BatchedMoERunner:
    """Runs batched experts for layers of one shape.

    Args:
        config: the layer's shape; ``config.max_num_tokens`` is the plan's T.
        experts: a function with the signature of ``moe_plugin.kernels.experts.batched_experts``.
    """

    def __init__(self, config: BatchedMoEConfig, experts: Experts) -> None:
        self.config = config
        self._experts = experts
        self._expected_rows = expected_rows(config)

    def run_experts(
        self,
        hidden_states: torch.Tensor,
        hidden_states_scale: torch.Tensor | None,
        masked_m: torch.Tensor,
        weights: ExpertWeights,
        expected_m: int,
        beside_m: int = 0,
    ) -> torch.Tensor:
        """Experts on the batched layout; what the host calls between its dispatch and combine.

        Args:
            hidden_states: [L, ranks * T, H]; rows ``[e, masked_m[e]:]`` may be NaN, are not read.
            hidden_states_scale: None, or [L, ranks * T, H / 128] float32, column-major.
            masked_m: [L] int32 on the device; never written.
            weights: the layer's experts.
            expected_m: mean live rows per expert; chooses tiles, never changes the result's rows.
            beside_m: rows that an expert may get besides. Both are without effect where the layer
                is batch invariant.

        Returns:
            [L, ranks * T, H] bf16 (fp32 for fp32 weights); rows past the count are unspecified.
        """
        # Within what was compiled for: the host rounds up to one more.
        compiled = self._expected_rows
        expected_m = max(compiled[0], min(expected_m, compiled[-1]))
        return self._experts(
            hidden_states,
            hidden_states_scale,
            weights,
            masked_m,
            expected_m,
            beside_m=0 if self.config.batch_invariant else beside_m,
        )

    def forward(
        self,
        transport: Transport,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        weights: ExpertWeights,
        *,
        metadata: DPMetadata | None = None,
    ) -> torch.Tensor:
        """The whole MoE layer as one call: the library API outside SGLang.

        Args:
            transport: a :class:`~moe_plugin.runtime.transports.base.Transport`.
            hidden_states: [n, H], n <= T; n = 0 is legal and still takes part in the collective.
            topk_ids: [n, K] int64 global expert ids; -1 = no expert.
            topk_weights: [n, K] float32, applied by combine.
            weights: the layer's experts.
            metadata: tokens per rank, where the caller knows them.

        Returns:
            [n, H], dtype of ``hidden_states``.

        Raises:
            BudgetError: more than T tokens on this rank, or on any rank in ``metadata``.
        """
        cfg = self.config
        recv, masked_m, handle, _, hook = transport.low_latency_dispatch(
            hidden_states,
            topk_ids,
            cfg.max_num_tokens,
            cfg.num_experts,
            use_fp8=weights.format.fp8_rows,
            return_recv_hook=True,
        )
        hook()
        recv_x, recv_scale = recv if isinstance(recv, tuple) else (recv, None)
        expected_m, beside_m = rows_to_launch_for(metadata, hidden_states.shape[0], cfg)
        output = self.run_experts(recv_x, recv_scale, masked_m, weights, expected_m, beside_m)
        combined, _, hook = transport.low_latency_combine(
            output, topk_ids, topk_weights, handle, return_recv_hook=True
        )
        hook()
        return combined


def expected_rows(config: BatchedMoEConfig) -> range:
    """Every mean of live rows per expert that a batch within T can have: what to compile for.

    Of a batch-invariant layer the largest alone, which stands for all.
    """
    full = DPMetadata((config.max_num_tokens,) * config.num_ranks)
    most = full.expected_rows(config.top_k, config.num_experts)
    return range(most if config.batch_invariant else 1, most + 1)


@cache
def warm_up(config: BatchedMoEConfig, weights: Format, activation: Activation = SWIGLU) -> int:
    """Compile and load the GPU kernels of a layer shape, once per process; returns how many.

    Nothing is compiled while requests are served or a graph is captured.
    """
    from ..kernels.experts import warmup

    started = time.monotonic()
    shape = Shape(
        config.num_local_experts,
        config.capacity,
        config.hidden_size,
        config.intermediate_size,
        weights,
        activation,
    )
    beside_prefill = config.other_ranks > 0 and not config.batch_invariant
    kernels = warmup(shape, expected_rows(config), beside_prefill=beside_prefill)
    seconds = time.monotonic() - started
    logger.info("moe_plugin: %d expert kernels ready after %.1f s", kernels, seconds)
    return kernels


def make_moe_runner(config: BatchedMoEConfig, device_type: str) -> BatchedMoERunner:
    """The one runner, with Triton experts on GPUs and plain-torch experts elsewhere."""
    if device_type == "cuda":
        from ..kernels.experts import batched_experts

        return BatchedMoERunner(config, batched_experts)
    from ..kernels.experts_torch import batched_experts_torch

    return BatchedMoERunner(config, batched_experts_torch)
