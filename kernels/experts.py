"""Entry points of the batched-expert layer: two launches, no host synchronisation."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from .expert_layer import Workspace, layer_problems, layer_specs, scale_specs, workspace_bytes
from .experts_torch import batched_experts_torch
from .launch import Device, Launch, Shape, pick_launch, portable_launch
from .portable.masked_gemm import launch_portable
from .problem import Problem, device_of, probe, tma_ready
from .sm90.gemm_launch import compile_hopper, run_hopper

__all__ = ["batched_experts", "batched_experts_torch", "warmup", "workspace_bytes"]

MOST_COMPILING = 8  # threads, of each rank of a host


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
    weights = w13, w13_scale, w2, w2_scale
    _check(hidden_states, hidden_states_scale, *weights, masked_m, out)
    device = device_of(hidden_states)
    fp8 = hidden_states_scale is not None
    experts, capacity, hidden = hidden_states.shape
    shape = Shape(experts, capacity, hidden, w2.shape[-1], fp8)
    if out is None:
        out = torch.empty(hidden_states.shape, dtype=torch.bfloat16, device=hidden_states.device)
    chosen = launch or pick_launch(shape, expected_m, device)

    def problems() -> tuple[Problem, Problem]:
        between = Workspace.of(shape, chosen, device).tensors(out.device)
        return layer_problems(
            hidden_states, hidden_states_scale, *weights, masked_m, between, out,
            chosen.gate_up.channels,
        )  # fmt: skip

    gemms = problems()
    if chosen.hopper and not all(tma_ready(p) for p in gemms):
        chosen = portable_launch(shape, expected_m)
        gemms = problems()
    run_layer(*gemms, chosen, device)
    return out


def _check(
    x: torch.Tensor, x_scale: torch.Tensor | None, w13: torch.Tensor,
    w13_scale: torch.Tensor | None, w2: torch.Tensor, w2_scale: torch.Tensor | None,
    masked_m: torch.Tensor, out: torch.Tensor | None,
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
    specs = scale_specs(Shape(experts, x.shape[1], hidden, inter, x_scale is not None))
    for scale, spec in zip(scales, specs, strict=True):
        if scale is not None and spec is not None:
            got = f"scales are {tuple(scale.shape)} {scale.dtype}, not {spec.shape} {spec.dtype}"
            assert (tuple(scale.shape), scale.dtype) == (spec.shape, spec.dtype), got
            assert spec.columns or scale.is_contiguous(), "scales of weights must be dense"
    if out is not None:
        got = f"out is {tuple(out.shape)} {out.dtype}, strides {out.stride()}"
        assert (out.shape, out.dtype) == (x.shape, torch.bfloat16), got
        assert out.is_contiguous(), got


def compile_layer(shape: Shape, launch: Launch, device: Device) -> list[Any]:
    """Compile the two kernels of one launch for the active driver, without running them."""
    return run_layer(*layer_specs(shape, launch, device), launch, device, compile_only=True)


def compile_at_once(shape: Shape, launches: Iterable[Launch], device: Device) -> list[Any]:
    """The kernels of several launches, compiled in threads: passes and assembler hold no lock."""
    with (
        ThreadPoolExecutor(min(MOST_COMPILING, os.cpu_count() or 1)) as pool,
        triton.AsyncCompileMode(pool),
    ):
        return [kernel for each in launches for kernel in compile_layer(shape, each, device)]


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
        launches = {pick_launch(shape, m, info) for m in expected_m}
        for kernel in compile_at_once(shape, launches, info):
            kernel._init_handles()  # a module cannot be loaded while a graph is captured
            compiled.add(kernel.hash)
    return len(compiled)
