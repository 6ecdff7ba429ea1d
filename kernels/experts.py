"""Entry points of the batched-expert layer: two launches, no host synchronisation."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
import triton

from .experts_torch import SCALE_BLOCK, batched_experts_torch
from .hopper_launch import compile_hopper, run_hopper
from .launch import Device, Launch, Shape, depth_split, pick_launch, portable_launch
from .masked_gemm import launch_portable
from .problem import Problem, Spec, device_of, probe, tma_ready

__all__ = ["batched_experts", "batched_experts_torch", "warmup", "workspace_bytes"]

MIN_GROUP = 64  # the narrowest re-quantisation group that a launch may choose


def act_and_scale(shape: Shape, group: int | None, device: torch.device) -> tuple[Any, Any]:
    """The activation between the GEMMs and, when re-quantised, its column-major scales."""
    rows = (shape.experts, shape.capacity)
    if group is None:
        return torch.empty((*rows, shape.inter), dtype=torch.bfloat16, device=device), None
    act = torch.empty((*rows, shape.inter), dtype=torch.float8_e4m3fn, device=device)
    finest = triton.cdiv(shape.inter, MIN_GROUP)
    scale = torch.empty(rows[0] * rows[1] * finest, dtype=torch.float32, device=device)
    groups = triton.cdiv(shape.inter, group)
    used = scale[: rows[0] * rows[1] * groups].view(rows[0], groups, rows[1])
    return act, used.transpose(1, 2)


def act_and_scale_specs(shape: Shape, group: int | None) -> tuple[Any, Any]:
    rows = (shape.experts, shape.capacity)
    if group is None:
        return Spec((*rows, shape.inter), torch.bfloat16), None
    scale = Spec((*rows, triton.cdiv(shape.inter, group)), torch.float32, columns=True)
    return Spec((*rows, shape.inter), torch.float8_e4m3fn), scale


def split_buffers(shape: Shape, make: Callable[..., Any]) -> tuple[Any, Any]:
    """Parts of the second GEMM where its depth is split, and the counters of their arrival."""
    split = depth_split(shape.experts, shape.hidden)
    if split == 1:
        return None, None
    rows = shape.experts * shape.capacity
    arrivals = triton.cdiv(rows, 8) * triton.cdiv(shape.hidden, 2 * MIN_GROUP)
    return make((rows, split, shape.hidden), dtype=torch.float32), make(
        (arrivals,), dtype=torch.int32
    )


def workspace_bytes(
    experts: int, capacity: int, hidden: int, inter: int, dtype: torch.dtype
) -> int:
    """Bytes that `batched_experts` allocates beyond its output: the activation between the two
    GEMMs, [L, M, I], for fp8 one float32 scale per row and 64 channels of it, and with one or two
    experts the float32 parts of the second GEMM. Only live rows are ever touched. GPUs without
    fp8 keep the activation in bf16; GPUs other than SM90 split no GEMM."""
    shape = Shape(experts, capacity, hidden, inter, dtype == torch.float8_e4m3fn)
    rows = experts * capacity
    total = rows * inter * dtype.itemsize
    if shape.fp8:
        total += 4 * rows * triton.cdiv(inter, MIN_GROUP)
    parts = split_buffers(shape, lambda size, dtype: torch.Size(size).numel() * dtype.itemsize)
    return total + sum(part or 0 for part in parts)


def layer_problems(
    x: Any, x_scale: Any, w13: Any, w13_scale: Any, w2: Any, w2_scale: Any, masked_m: Any,
    act: Any, act_scale: Any, out: Any, group: int, parts: tuple[Any, Any] = (None, None),
) -> tuple[Problem, Problem]:  # fmt: skip
    gate_up = Problem(
        x, x_scale, w13, w13_scale, masked_m, act, act_scale, True, SCALE_BLOCK, None, parts[1]
    )
    down = Problem(act, act_scale, w2, w2_scale, masked_m, out, None, False, group, *parts)
    return gate_up, down


def run_layer(
    gate_up: Problem, down: Problem, launch: Launch, device: Device, compile_only: bool = False
) -> list[Any]:
    if launch.hopper:
        run = compile_hopper if compile_only else run_hopper
        return [
            run(gate_up, launch.gate_up, device, chained=False),
            run(down, launch.down, device, chained=True),
        ]
    return [
        launch_portable(gate_up, launch.gate_up, device, compile_only=compile_only),
        launch_portable(down, launch.down, device, compile_only=compile_only),
    ]


_picked = cache(pick_launch)  # an eager forward asks for the same few again and again


def batched_experts(
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
    launch: Launch | None = None,
) -> torch.Tensor:
    """SwiGLU experts over [L, M, H] of which rows `[e, :masked_m[e]]` are live.

    hidden_states: [L, M, H] bf16, or float8_e4m3fn with hidden_states_scale [L, M, H // 128]
        float32, column-major as DeepEP delivers it (any strides work, those are the fast ones).
    w13, w2: [L, 2I, H] (gate rows, then up rows) and [L, H, I], bf16, or float8_e4m3fn with
        float32 scales per 128x128 block: [L, ceil(2I/128), ceil(H/128)], [L, ceil(H/128),
        ceil(I/128)].
    masked_m: [L] int32 on the device. Rows past the count may hold NaN: they reach no result, and
        `out` is not written there.
    expected_m: rows per expert that the host expects; it chooses tiles and cannot affect
        correctness. `launch` overrides that choice (tuning, tests).

    Returns [L, M, H] bf16. Safe under CUDA-graph capture: counts are read on the device only.
    """
    experts, capacity, hidden = hidden_states.shape
    inter = w2.shape[-1]
    fp8 = hidden_states_scale is not None
    _check(hidden_states, hidden_states_scale, w13, w13_scale, w2, w2_scale, masked_m)
    device = device_of(hidden_states)
    shape = Shape(experts, capacity, hidden, inter, fp8)
    if out is None:
        out = torch.empty(
            (experts, capacity, hidden), dtype=torch.bfloat16, device=hidden_states.device
        )
    launch = launch or _picked(shape, expected_m, device)
    group, split = launch.gate_up.channels, launch.down.split > 1
    act, act_scale = act_and_scale(
        shape, group if fp8 and device.has_fp8 else None, hidden_states.device
    )
    parts = split_buffers(shape, partial(torch.empty, device=out.device)) if split else (None, None)
    problems = layer_problems(
        hidden_states, hidden_states_scale, w13, w13_scale, w2, w2_scale, masked_m, act, act_scale,
        out, group, parts,
    )  # fmt: skip
    if launch.hopper and not all(tma_ready(p) for p in problems):
        launch = portable_launch(shape, expected_m)
        return batched_experts(
            hidden_states, hidden_states_scale, w13, w13_scale, w2, w2_scale, masked_m, expected_m,
            out=out, launch=launch,
        )  # fmt: skip
    run_layer(*problems, launch, device)
    return out


def _check(
    x: torch.Tensor, x_scale: torch.Tensor | None, w13: torch.Tensor,
    w13_scale: torch.Tensor | None, w2: torch.Tensor, w2_scale: torch.Tensor | None,
    masked_m: torch.Tensor,
) -> None:  # fmt: skip
    experts, _, hidden = x.shape
    inter = w2.shape[-1]
    assert w13.shape == (experts, 2 * inter, hidden), f"w13 is {tuple(w13.shape)}"
    assert w2.shape == (experts, hidden, inter), f"w2 is {tuple(w2.shape)}"
    assert masked_m.shape == (experts,), f"masked_m is {tuple(masked_m.shape)}"
    assert masked_m.dtype == torch.int32, f"masked_m is {masked_m.dtype}, not int32"
    assert hidden % 16 == inter % 16 == 0, f"H={hidden}, I={inter}: multiples of 16 only"
    scales = (x_scale, w13_scale, w2_scale)
    assert all(s is None for s in scales) or all(s is not None for s in scales), (
        "fp8 needs all three scale tensors, bf16 none"
    )
    dtype = torch.bfloat16 if x_scale is None else torch.float8_e4m3fn
    assert x.dtype == w13.dtype == w2.dtype == dtype, f"{x.dtype}, {w13.dtype}, {w2.dtype}"
    assert x.stride(2) == w13.stride(2) == w2.stride(2) == 1, "channels must be contiguous"


def compile_layer(shape: Shape, launch: Launch, device: Device) -> list[Any]:
    """Compile the two kernels of one launch for the active driver, without running them."""
    dtype = torch.float8_e4m3fn if shape.fp8 else torch.bfloat16
    rows, hidden, inter = (shape.experts, shape.capacity), shape.hidden, shape.inter
    x_scale = w13_scale = w2_scale = None
    if shape.fp8:
        x_scale = Spec((*rows, hidden // SCALE_BLOCK), torch.float32, columns=True)
        across, inner = triton.cdiv(hidden, SCALE_BLOCK), triton.cdiv(inter, SCALE_BLOCK)
        outer = triton.cdiv(2 * inter, SCALE_BLOCK)
        w13_scale = Spec((shape.experts, outer, across), torch.float32)
        w2_scale = Spec((shape.experts, across, inner), torch.float32)
    group = launch.gate_up.channels
    quantise = shape.fp8 and device.has_fp8
    act, act_scale = act_and_scale_specs(shape, group if quantise else None)
    problems = layer_problems(
        Spec((*rows, hidden), dtype), x_scale, Spec((shape.experts, 2 * inter, hidden), dtype),
        w13_scale, Spec((shape.experts, hidden, inter), dtype), w2_scale,
        Spec((shape.experts,), torch.int32), act, act_scale, Spec((*rows, hidden), torch.bfloat16),
        group, split_buffers(shape, Spec) if launch.down.split > 1 else (None, None),
    )  # fmt: skip
    return run_layer(*problems, launch, device, compile_only=True)


def warmup(
    experts: int,
    capacity: int,
    hidden: int,
    inter: int,
    dtype: torch.dtype,
    expected_m: Iterable[int],
    device: torch.device | int | None = None,
) -> int:
    """Compile and load every kernel that these row counts can reach; returns how many.

    Needs no tensors of the layer's size. Kernels come from Triton's cache where it has them.
    """
    index = torch.cuda.current_device() if device is None else torch.device(device).index or 0
    info = probe(index)
    shape = Shape(experts, capacity, hidden, inter, dtype == torch.float8_e4m3fn)
    compiled = set()
    with torch.cuda.device(index):
        for launch in {pick_launch(shape, m, info) for m in expected_m}:
            for kernel in compile_layer(shape, launch, info):
                kernel._init_handles()  # a module cannot be loaded while a graph is captured
                compiled.add(kernel.hash)
    return len(compiled)
