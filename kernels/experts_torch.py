"""The batched-expert layer in plain torch: the definition that the kernels are tested against.

Needs no triton, runs on CPU and GPU, and is short enough to read in one go.
"""

import torch
from torch.nn.functional import pad

from .formats import FP8_MAX, MIN_AMAX, SCALE_BLOCK, Activation
from .packing import STRIP, dequantise_packed_torch
from .weights import ExpertWeights


def quantise_groups_torch(
    x: torch.Tensor, group: int = SCALE_BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [..., K] to float8_e4m3fn with one float32 scale per `group` channels (ragged tail)."""
    width = x.shape[-1]
    groups = -(-width // group)
    grouped = pad(x.float(), (0, groups * group - width)).unflatten(-1, (groups, group))
    scale = grouped.abs().amax(-1).clamp_min(MIN_AMAX) / FP8_MAX
    q = (grouped / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX)
    return q.flatten(-2)[..., :width].to(torch.float8_e4m3fn), scale


def dequantise_groups_torch(
    q: torch.Tensor, scale: torch.Tensor, group: int = SCALE_BLOCK
) -> torch.Tensor:
    """Inverse of `quantise_groups_torch`, in float32."""
    return q.float() * scale.repeat_interleave(group, -1)[..., : q.shape[-1]]


def dequantise_blocks_torch(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Expand one float32 scale per tile of `SCALE_BLOCK` squared of [..., N, K], in float32."""
    rows = scale.repeat_interleave(SCALE_BLOCK, -2)[..., : q.shape[-2], :]
    return q.float() * rows.repeat_interleave(SCALE_BLOCK, -1)[..., : q.shape[-1]]


def dequantise_expert_torch(
    weights: ExpertWeights, expert: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One expert's w13 [2I, H] and w2 [H, I] in float32."""
    w13, w2 = weights.w13[expert], weights.w2[expert]
    if weights.w13_scale is None or weights.w2_scale is None:
        return w13.float(), w2.float()
    s13, s2 = weights.w13_scale[expert], weights.w2_scale[expert]
    if weights.format.packed:
        hidden, inter = w2.shape[0] * STRIP, w13.shape[0] * STRIP // 2
        return (
            dequantise_packed_torch(w13, s13, hidden, weights.format),
            dequantise_packed_torch(w2, s2, inter, weights.format),
        )
    if weights.format.weight_scale == "tensor":
        return w13.float() * s13, w2.float() * s2
    if weights.format.weight_scale == "channel":
        return w13.float() * s13.unsqueeze(-1), w2.float() * s2.unsqueeze(-1)
    return dequantise_blocks_torch(w13, s13), dequantise_blocks_torch(w2, s2)


def activate_torch(both: torch.Tensor, activation: Activation) -> torch.Tensor:
    """[..., 2I] products of w13 to [..., I], in the dtype that they have."""
    inter = both.shape[-1] // 2
    gate, up = both[..., :inter], both[..., inter:]
    if activation.interleaved:
        gate, up = both[..., ::2], both[..., 1::2]
    limit = activation.limit
    if limit is not None:
        up = up.clamp(-limit, limit)
        if activation.kind == "swiglu":
            gate = gate.clamp(max=limit)
    gate = gate * torch.sigmoid(activation.alpha * gate)
    if activation.kind == "swiglu_clamped":
        gate = gate.clamp(max=limit)
    return gate * (up + activation.beta)


def batched_experts_torch(
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None,
    weights: ExpertWeights,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    beside_m: int = 0,
    out: torch.Tensor | None = None,
    scale_group: int = SCALE_BLOCK,
) -> torch.Tensor:
    """Gated experts over [L, M, H] of which rows `[e, :masked_m[e]]` are live.

    bf16, fp32, or float8_e4m3fn with scales; products accumulate in float32 and the activation is
    rounded to the input's precision between the two GEMMs. Rows past the count may hold NaN: they
    reach no result and are not changed in `out`. `expected_m` and `beside_m` have no effect here.
    In fp8, `scale_group` channels of the activation share a scale; in the kernels the launch
    decides.
    Packed weights are rounded to bf16 after their scale, as the tensor cores take them.
    """
    del expected_m, beside_m
    experts, capacity, hidden = hidden_states.shape
    fp8 = weights.format.fp8_rows
    dtype = torch.bfloat16 if fp8 else hidden_states.dtype
    if out is None:
        out = hidden_states.new_empty((experts, capacity, hidden), dtype=dtype)
    # Where counts lie in CPU memory the capacity need not be paid; on a GPU that would synchronise.
    rows = capacity if masked_m.is_cuda else min(capacity, max(0, int(masked_m.max())))
    for e in range(experts):
        live = (torch.arange(rows, device=masked_m.device) < masked_m[e]).unsqueeze(-1)
        x = hidden_states[e, :rows]
        if hidden_states_scale is not None:
            x = dequantise_groups_torch(x, hidden_states_scale[e, :rows])
        gate_up, down = dequantise_expert_torch(weights, e)
        if weights.format.packed:
            gate_up, down = gate_up.bfloat16().float(), down.bfloat16().float()
        both = torch.where(live, x.float(), 0.0) @ gate_up.T
        if weights.w13_bias is not None:
            both += weights.w13_bias[e]
        act = activate_torch(both, weights.activation)
        if fp8:
            q, scale = quantise_groups_torch(act, scale_group)
            act = dequantise_groups_torch(q, scale, scale_group)
        else:
            act = act.to(dtype).float()
        y = act @ down.T
        if weights.w2_bias is not None:
            y += weights.w2_bias[e]
        out[e, :rows] = torch.where(live, y.to(dtype), out[e, :rows])
    return out
