"""A layer that has run before, launched the short way.

In a forward that replays no graph the GPU waits for Python once per layer. So what a layer's shape
and the addresses of its weights decide is laid out once. A call is two allocations, a look at the
tensors it was given, and two launches past Triton's Python.
"""

from functools import cache
from typing import Any

import torch
import triton

from ..expert_layer import Workspace, layer_specs, scale_specs
from ..launch import Device, Launch, Shape, pick_launch
from ..problem import ALIGNMENT
from .direct_launch import DirectLaunch
from .gemm_launch import HopperLaunch

MOST_LAYERS = 4096


class LaunchPair:
    """A layer's two launches and its workspace, whatever its weights."""

    def __init__(self, shape: Shape, launch: Launch, device: Device) -> None:
        first, second = layer_specs(shape, launch, device)
        self.gate_up = DirectLaunch(HopperLaunch(first, launch.gate_up, device, False))
        self.down = DirectLaunch(HopperLaunch(second, launch.down, device, True))
        self.workspace = Workspace.of(shape, launch, device)


@cache
def launch_pair(shape: Shape, launch: Launch, device: Device, index: int) -> LaunchPair | None:
    """What the layers of one shape share on GPU `index`; None where it cannot be had."""
    del index  # of the GPU that holds the kernels
    try:
        return LaunchPair(shape, launch, device)
    except NotImplementedError:
        return None


Ready = tuple[LaunchPair, tuple[Any, ...], tuple[Any, ...]]  # and both weights' tensor maps


class HopperLayer:
    """The experts of one layer, known by the addresses of its weights and their scales (or 0)."""

    def __init__(self, shape: Shape, device: Device, addresses: tuple[int, int, int, int]) -> None:
        self._shape, self._device = shape, device
        self._w13, self._w13_scale, self._w2, self._w2_scale = addresses
        self._counts = (shape.experts,)
        x_scale = scale_specs(shape)[0]
        self._scale_strides = None if x_scale is None else x_scale.stride()
        self._by_launch: dict[Launch, Ready | None] = {}
        self._ready: dict[int, Ready | None] = {}  # by expected rows, many of which share a launch

    def _prepare(self, expected_m: int, index: int) -> None:
        launch = pick_launch(self._shape, expected_m, self._device)
        if launch not in self._by_launch:
            pair = launch_pair(self._shape, launch, self._device, index) if launch.hopper else None
            self._by_launch[launch] = None if pair is None else (
                pair, pair.gate_up.weights(self._w13), pair.down.weights(self._w2)
            )  # fmt: skip
        self._ready[expected_m] = self._by_launch[launch]

    def run(
        self,
        x: torch.Tensor,
        x_scale: torch.Tensor | None,
        masked_m: torch.Tensor,
        expected_m: int,
        out: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """As `batched_experts`; None, and nothing done, where the tensors are not as usual."""
        index = x.get_device()
        if expected_m not in self._ready:
            self._prepare(expected_m, index)
        ready = self._ready[expected_m]
        rows, counts = x.data_ptr(), masked_m.data_ptr()
        scales = 0 if x_scale is None else x_scale.data_ptr()
        # Triton compiled for aligned pointers, and the copy engine wants dense rows.
        usual = not (rows | scales | counts) % ALIGNMENT and x.is_contiguous()
        usual = usual and masked_m.dtype == torch.int32 and masked_m.shape == self._counts
        usual = usual and self._scale_strides == (None if x_scale is None else x_scale.stride())
        if ready is None or not usual:
            return None
        pair, w13, w2 = ready
        if out is None:
            out = torch.empty_like(x, dtype=torch.bfloat16)
        result = out.data_ptr()
        if result % ALIGNMENT:
            return None
        memory = torch.empty(pair.workspace.total, dtype=torch.uint8, device=x.device)
        act, parts, arrivals, act_scale = pair.workspace.addresses(memory.data_ptr())
        stream = triton.runtime.driver.active.get_current_stream(index)
        pair.gate_up(
            stream, w13, pair.gate_up.rows(rows, scales),
            (self._w13_scale or None, counts, act, act_scale, None, arrivals),
        )  # fmt: skip
        pair.down(
            stream, w2, pair.down.rows(act, act_scale or 0),
            (self._w2_scale or None, counts, result, None, parts, arrivals),
        )  # fmt: skip
        return out


_LAYERS: dict[tuple[Any, ...], HopperLayer | None] = {}  # None: always the long way
_HOOKS = triton.knobs.runtime


def _key(
    x: torch.Tensor, w13: torch.Tensor, w13_scale: torch.Tensor | None, w2: torch.Tensor,
    w2_scale: torch.Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    scales = (0, 0) if w13_scale is None or w2_scale is None else (
        w13_scale.data_ptr(), w2_scale.data_ptr()
    )  # fmt: skip
    return (
        w13.data_ptr(), scales[0], w2.data_ptr(), scales[1], x.shape, x.dtype, w13.shape,
        w13.dtype, w2.shape, w2.dtype, x.get_device(),
    )  # fmt: skip


def remember_layer(
    x: torch.Tensor, w13: torch.Tensor, w13_scale: torch.Tensor | None, w2: torch.Tensor,
    w2_scale: torch.Tensor | None, shape: Shape, device: Device,
) -> None:  # fmt: skip
    """Note a layer that has been checked and launched, so that it can go the short way next."""
    key = _key(x, w13, w13_scale, w2, w2_scale)
    if key in _LAYERS:  # and could not go the short way
        return
    if len(_LAYERS) >= MOST_LAYERS:
        _LAYERS.clear()
    # Shapes, dtypes and density were checked; what is left is what Triton compiled for.
    usual = not any(address % ALIGNMENT for address in key[:4])
    _LAYERS[key] = HopperLayer(shape, device, key[:4]) if usual else None


def run_remembered(
    x: torch.Tensor, x_scale: torch.Tensor | None, w13: torch.Tensor,
    w13_scale: torch.Tensor | None, w2: torch.Tensor, w2_scale: torch.Tensor | None,
    masked_m: torch.Tensor, expected_m: int, out: torch.Tensor | None,
) -> torch.Tensor | None:  # fmt: skip
    """The layer's result, or None where it has to go the long way."""
    layer = _LAYERS.get(_key(x, w13, w13_scale, w2, w2_scale))
    if layer is None or _hooked():
        return None
    return layer.run(x, x_scale, masked_m, expected_m, out)


def _hooked() -> bool:
    """Whether somebody wants to see launches, such as a profiler."""
    enter, leave = _HOOKS.launch_enter_hook, _HOOKS.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
