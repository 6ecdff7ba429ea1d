"""Entry points of the batched-expert layer: two launches, and the CPU waits for neither."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

from .entry_checks import check_layer
from .expert_layer import layer_problems, layer_specs, workspace_tensors
from .experts_torch import batched_experts_torch
from .launch import SOME_ROWS, Device, Launch, Shape, pick_launch, portable_launch
from .portable.masked_gemm import launch_portable
from .problem import Problem, device_of, probe, tma_ready
from .sm90.gemm_launch import compile_hopper, run_hopper
from .weights import ExpertWeights
from .workspace import launch_workspace

__all__ = ["batched_experts", "batched_experts_torch", "warmup"]

MOST_COMPILING = 8  # threads, of each rank of a machine


def run_layer(
    gate_up: Problem, down: Problem, launch: Launch, device: Device, compile_only: bool = False
) -> list[Any]:
    """Launch both GEMMs, or only compile them."""
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
    weights: ExpertWeights,
    masked_m: torch.Tensor,
    expected_m: int,
    *,
    beside_m: int = 0,
    out: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> torch.Tensor:
    """Gated experts over [L, M, H] of which rows `[e, :masked_m[e]]` are live.

    hidden_states: [L, M, H] bf16, or float8_e4m3fn with hidden_states_scale [L, M, H // 128]
        float32, column-major as DeepEP delivers it (any strides work, those are the fast ones; so
        is an M that is a multiple of four).
    masked_m: [L] int32 on the device, read as if clamped to [0, M]. Rows past the count may hold
        NaN: they reach no result, and `out` is not written there.
    expected_m: rows per expert that the caller expects; `beside_m`: that may come besides. They
        choose tiles and cannot affect correctness. `launch` overrides that choice (tuning, tests).

    Returns [L, M, H] bf16. Safe under CUDA-graph capture: counts are read on the device only.

    Raises:
        ValueError: a tensor that the kernels would misread; see `entry_checks`.
    """
    shape = check_layer(hidden_states, hidden_states_scale, weights, masked_m, out)
    device = device_of(hidden_states)
    if out is None:
        out = torch.empty(hidden_states.shape, dtype=torch.bfloat16, device=hidden_states.device)
    chosen = launch or pick_launch(shape, expected_m, device, beside_m)

    def problems() -> tuple[Problem, Problem]:
        between = workspace_tensors(launch_workspace(shape, chosen, device), out.device)
        return layer_problems(
            hidden_states, hidden_states_scale, weights, masked_m, between, out,
            chosen.gate_up.block_n,
        )  # fmt: skip

    gemms = problems()
    if chosen.hopper and not all(tma_ready(p) for p in gemms):
        chosen = portable_launch(shape, expected_m)
        gemms = problems()
    run_layer(*gemms, chosen, device)
    return out


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
    shape: Shape,
    expected_m: Iterable[int],
    device: torch.device | int | None = None,
    *,
    beside_prefill: bool = False,
) -> int:
    """Compile and load every kernel that these row counts can reach, alone or, `beside_prefill`,
    with any number of rows besides; returns how many.

    Needs no tensors of the layer's size. Kernels come from Triton's cache where it has them.
    """
    index = torch.cuda.current_device() if device is None else torch.device(device).index or 0
    info = probe(index)
    compiled = set()
    with torch.cuda.device(index):
        besides = (0, 1, SOME_ROWS) if beside_prefill else (0,)  # all that makes a difference
        launches = {pick_launch(shape, m, info, b) for m in expected_m for b in besides}
        for kernel in compile_at_once(shape, launches, info):
            kernel._init_handles()  # a module cannot be loaded while a graph is captured
            compiled.add(kernel.hash)
    return len(compiled)
