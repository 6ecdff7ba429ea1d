"""A layer as its two GEMMs, and the tensors between them."""

from typing import Any

import torch

from .formats import SCALE_BLOCK
from .launch import Device, Launch, Shape, ceil_div
from .packing import STRIP, packed_words, scale_words
from .problem import Problem, Spec
from .weights import ExpertWeights
from .workspace import Region, WorkspaceLayout, launch_workspace


def regions(layout: WorkspaceLayout) -> tuple[Region | None, ...]:
    """act and act_scale, in the order that `layer_problems` takes them."""
    return layout.act, layout.act_scale


def region_spec(region: Region | None) -> Spec | None:
    """Stands for the region's tensor."""
    if region is None:
        return None
    return Spec(region.shape, getattr(torch, region.dtype), region.columns)


def workspace_tensors(
    layout: WorkspaceLayout, device: torch.device | str
) -> list[torch.Tensor | None]:
    """Freshly allocated act and act_scale, in one allocation."""
    memory = torch.empty(layout.total, dtype=torch.uint8, device=device)

    def view(region: Region | None) -> torch.Tensor | None:
        spec = region_spec(region)
        if region is None or spec is None:
            return None
        start = region.offset // spec.dtype.itemsize
        return memory.view(spec.dtype).as_strided(spec.shape, spec.stride(), start)

    return [view(region) for region in regions(layout)]


def layer_problems(
    x: Any, x_scale: Any, weights: ExpertWeights, masked_m: Any, between: list[Any], out: Any,
    scale_group: int,
) -> tuple[Problem, Problem]:  # fmt: skip
    """Both GEMMs of one layer; `between` as `workspace_tensors` makes it, `scale_group` the
    channels of the activation that share a scale."""
    act, act_scale = between
    gate_up = Problem(
        x, x_scale, weights.w13, weights.w13_scale, weights.w13_bias, masked_m, act, act_scale,
        weights.format, weights.activation, SCALE_BLOCK,
    )  # fmt: skip
    down = Problem(
        act, act_scale, weights.w2, weights.w2_scale, weights.w2_bias, masked_m, out, None,
        weights.format, None, scale_group,
    )  # fmt: skip
    return gate_up, down


def rows_scale_spec(shape: Shape) -> Spec | None:
    """Row scales as the fast kernels want them: column-major, as DeepEP delivers them."""
    if not shape.format.fp8_rows:
        return None
    size = (shape.experts, shape.capacity, shape.hidden // SCALE_BLOCK)
    return Spec(size, torch.float32, columns=True)


def weight_specs(shape: Shape) -> ExpertWeights:
    """Weights of a shape, as stand-ins."""
    experts, hidden, inter, fmt = shape.experts, shape.hidden, shape.inter, shape.format
    dtype = torch.float8_e4m3fn if fmt.weight_bits == 8 else torch.bfloat16

    def matrix(rows: int, depth: int) -> Spec:
        if fmt.packed:
            return Spec((experts, rows // STRIP, packed_words(depth)), torch.int32)
        return Spec((experts, rows, depth), dtype)

    def scale(rows: int, depth: int) -> Spec | None:
        if fmt.weight_scale == "none":
            return None
        if fmt.weight_scale == "group":
            return Spec((experts, rows // STRIP, scale_words(depth, fmt)), torch.int32)
        if fmt.weight_scale == "channel":
            return Spec((experts, rows), torch.float32)
        if fmt.weight_scale == "tensor":
            return Spec((experts,), torch.float32)
        size = (experts, ceil_div(rows, SCALE_BLOCK), ceil_div(depth, SCALE_BLOCK))
        return Spec(size, torch.float32)

    def bias(rows: int) -> Spec | None:
        return Spec((experts, rows), torch.float32) if shape.activation.bias else None

    tensors: tuple[Any, ...] = (
        matrix(2 * inter, hidden), matrix(hidden, inter), scale(2 * inter, hidden),
        scale(hidden, inter), fmt, shape.activation,
        bias(2 * inter), bias(hidden),
    )  # fmt: skip
    return ExpertWeights(*tensors)


def layer_specs(shape: Shape, launch: Launch, device: Device) -> tuple[Problem, Problem]:
    """Both GEMMs of stand-ins, for compiling."""
    dtype = torch.float8_e4m3fn if shape.format.fp8_rows else torch.bfloat16
    rows = (shape.experts, shape.capacity, shape.hidden)
    between = [region_spec(region) for region in regions(launch_workspace(shape, launch, device))]
    return layer_problems(
        Spec(rows, dtype), rows_scale_spec(shape), weight_specs(shape),
        Spec((shape.experts,), torch.int32), between, Spec(rows, torch.bfloat16),
        launch.gate_up.block_n,
    )  # fmt: skip
