"""The layer in three launches: the reference for the fused kernels, and for activations that their
epilogue does not know."""

import torch
import triton
import triton.language as tl

from ..experts_torch import SCALE_BLOCK, quantise_groups_torch
from ..problem import device_of, lane_count
from .masked_gemm import masked_grouped_gemm, masked_grouped_gemm_torch
from .masked_gemm_kernel import FP8_MAX, MIN_AMAX, cast, load_counts, locate

ROWS = 16  # rows of one program's tile


@triton.jit
def _masked_silu_quant_kernel(
    both, counts_ptr, act, scale_ptr, experts, capacity, groups, width,
    BT: tl.constexpr, GROUP: tl.constexpr, LP: tl.constexpr, QUANTISE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    counts, ends = load_counts(counts_ptr, experts, groups, BT, LP)
    for tile in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        expert, group, row, rows = locate(tile, counts, ends, BT, LP)
        at = row + tl.arange(0, BT)
        cols = group * GROUP + tl.arange(0, GROUP)
        first = expert.to(tl.int64) * capacity
        live = (at < rows)[:, None] & (cols < width)[None, :]
        gate_at = both + (first + at)[:, None] * (2 * width) + cols[None, :]
        gate = tl.load(gate_at, mask=live, other=0.0).to(tl.float32)
        up = tl.load(gate_at + width, mask=live, other=0.0).to(tl.float32)
        value = gate / (1.0 + tl.exp(-gate)) * up
        if QUANTISE:
            scale = tl.maximum(tl.max(tl.abs(value), 1), MIN_AMAX) / FP8_MAX
            value *= (1.0 / scale)[:, None]
            scale_at = scale_ptr + (expert.to(tl.int64) * groups + group) * capacity + at
            tl.store(scale_at, scale, mask=at < rows)
        out_at = act + (first + at)[:, None] * width + cols[None, :]
        tl.store(out_at, cast(value, act.dtype.element_ty, ROUND), mask=live)


def masked_silu_quant(
    both: torch.Tensor, masked_m: torch.Tensor, quantise: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SwiGLU of bf16 [L, M, 2I] (gates, then ups), live rows only: bf16 [L, M, I], or
    float8_e4m3fn with column-major scales [L, M, ceil(I/128)]."""
    experts, capacity, width = both.shape[0], both.shape[1], both.shape[2] // 2
    assert both.is_contiguous(), "gates and ups must be dense rows"
    groups = triton.cdiv(width, SCALE_BLOCK)
    dtype = torch.float8_e4m3fn if quantise else torch.bfloat16
    act = torch.empty((experts, capacity, width), dtype=dtype, device=both.device)
    scale = None
    if quantise:
        scale = torch.empty((experts, groups, capacity), device=both.device).transpose(1, 2)
    grid = (min(experts * triton.cdiv(capacity, ROWS) * groups, 8 * device_of(both).sms),)
    _masked_silu_quant_kernel[grid](
        both, masked_m, act, scale, experts, capacity, groups, width, ROWS, SCALE_BLOCK,
        lane_count(experts), quantise, triton.knobs.runtime.interpret,
    )  # fmt: skip
    return act, scale


def masked_silu_quant_torch(
    both: torch.Tensor, masked_m: torch.Tensor, quantise: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`masked_silu_quant` in plain torch; rows past the count hold zero."""
    live = (torch.arange(both.shape[1], device=both.device) < masked_m[:, None])[..., None]
    gate, up = torch.where(live, both.float(), 0.0).chunk(2, -1)
    act = torch.nn.functional.silu(gate) * up
    return quantise_groups_torch(act) if quantise else (act.bfloat16(), None)


def batched_experts_unfused(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None,
    w13: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2: torch.Tensor,
    w2_scale: torch.Tensor | None,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`batched_experts` with gates and ups rounded to bf16 and written out in between."""
    both = masked_grouped_gemm(
        hidden_states, hidden_states_scale, w13, w13_scale, masked_m, expected_m
    )
    act, scale = masked_silu_quant(both, masked_m, hidden_states_scale is not None)
    return masked_grouped_gemm(act, scale, w2, w2_scale, masked_m, expected_m, out=out)


def batched_experts_unfused_torch(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None,
    w13: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2: torch.Tensor,
    w2_scale: torch.Tensor | None,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`batched_experts_unfused` in plain torch."""
    both = masked_grouped_gemm_torch(
        hidden_states, hidden_states_scale, w13, w13_scale, masked_m, expected_m
    )
    act, scale = masked_silu_quant_torch(both, masked_m, hidden_states_scale is not None)
    return masked_grouped_gemm_torch(act, scale, w2, w2_scale, masked_m, expected_m, out=out)
