"""4-bit weights of the host's layers that are updated: given back, loaded into, repacked."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_plugin.errors import UnsupportedError
from moe_plugin.integration.serve import packed_weights, weight_updates
from moe_plugin.integration.serve.expert_weights import expert_weights
from moe_plugin.integration.serve.packed_layouts import scale_parameter
from moe_plugin.integration.serve.packed_weights import codes_and_scales, take_over_loading
from moe_plugin.kernels import packing
from moe_plugin.kernels.experts_torch import dequantise_expert_torch
from moe_plugin.kernels.formats import INT4_G32, INT4_G128_ZERO, MXFP4

from ..support.packed_layer import (
    CASES,
    EXPERTS,
    HIDDEN,
    INTER,
    LAYERS,
    NAMES,
    host_layer,
    packed,
    repacked_layer,
)  # fmt: skip


@LAYERS
def test_weights_loaded_anew_stay_where_graphs_read_them(method: str, fmt: Any, inter: int) -> None:
    """As the host reloads, and once more: restored, filled, processed."""
    layer, _ = host_layer(method, fmt.group_size, fmt.zero_points, inter=inter)
    created = {name: (p.shape, p.dtype) for name, p in layer.named_parameters()}
    take_over_loading(layer)
    layer.quant_method.restore_weights_before_loading(layer)  # nothing is repacked yet
    layer.quant_method.process_weights_after_loading(layer)
    graph = [tensor.data for name in NAMES for tensor in codes_and_scales(layer, name)]
    for seed in (1, 2):
        other, expected = host_layer(method, fmt.group_size, fmt.zero_points, seed, inter)
        for _ in range(2):  # the host restores again where a load failed
            layer.quant_method.restore_weights_before_loading(layer)
        mine = dict(layer.named_parameters())
        assert {name: (mine[name].shape, mine[name].dtype) for name in created} == created
        for name, loaded in other.named_parameters():
            mine[name].copy_(loaded)
        layer.quant_method.process_weights_after_loading(layer)
        now = [tensor for name in NAMES for tensor in codes_and_scales(layer, name)]
        for read, held in zip(graph, now, strict=True):
            assert (read.data_ptr(), read.shape) == (held.data_ptr(), held.shape)
        for expert in range(EXPERTS):
            found = dequantise_expert_torch(expert_weights(layer), expert)
            for name, weights in zip(NAMES, found, strict=True):
                assert torch.equal(weights, expected[name][expert])


@LAYERS
def test_a_session_that_sends_no_expert_changes_none(method: str, fmt: Any, inter: int) -> None:
    """Attention alone, or a filter of names: the host is given back what it loaded."""
    layer, loaded = repacked_layer(method, fmt, inter)
    before = packed(layer)
    for _ in range(2):
        layer.quant_method.restore_weights_before_loading(layer)
        for name, parameter in loaded.items():
            assert torch.equal(getattr(layer, name), parameter), name
        layer.quant_method.process_weights_after_loading(layer)
        assert all(map(torch.equal, packed(layer), before))


@LAYERS
def test_a_session_changes_only_what_it_sends(method: str, fmt: Any, inter: int) -> None:
    """One expert's w13."""
    layer, _ = repacked_layer(method, fmt, inter)
    other, sent = repacked_layer(method, fmt, inter, seed=1)
    expected = packed(layer)
    for was, comes in zip(expected[:2], packed(other), strict=False):
        was[1] = comes[1]
    layer.quant_method.restore_weights_before_loading(layer)
    for name, parameter in sent.items():
        if name.startswith("w13") and len(parameter):
            getattr(layer, name).data[1] = parameter[1]
    layer.quant_method.process_weights_after_loading(layer)
    assert all(map(torch.equal, packed(layer), expected))


def fails_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Have a function of the packing run out of memory once, at its n-th call."""
    original, calls = getattr(packing, name), []

    def function(*args: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise torch.OutOfMemoryError
        return original(*args)

    monkeypatch.setattr(packing, name, function)


AT = pytest.mark.parametrize("call", [1, EXPERTS + 2])
"""The first expert of w13, and the second of w2."""
SOME = pytest.mark.parametrize(
    ("method", "fmt", "inter"),
    [
        ("CompressedTensorsFusedMoEMethod", INT4_G32, INTER),
        ("AWQMoEMethod", INT4_G128_ZERO, INTER),
        ("Fp8MoEMethod", MXFP4, 96),
    ],
    ids=str,
)
"""Scales as large as ours; zero points; a depth that is padded."""


@AT
@SOME
def test_restoring_goes_on_where_it_failed(
    method: str, fmt: Any, inter: int, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, loaded = repacked_layer(method, fmt, inter)
    before = packed(layer)
    fails_at(monkeypatch, "unpack_codes", call)
    with pytest.raises(torch.OutOfMemoryError):
        layer.quant_method.restore_weights_before_loading(layer)
    layer.quant_method.restore_weights_before_loading(layer)
    for name, parameter in loaded.items():
        assert torch.equal(getattr(layer, name), parameter), name
    layer.quant_method.process_weights_after_loading(layer)
    assert all(map(torch.equal, packed(layer), before))


@AT
@SOME
def test_what_was_restored_in_part_is_repacked_as_it_was(
    method: str, fmt: Any, inter: int, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _ = repacked_layer(method, fmt, inter)
    graph, before = [p.data_ptr() for p in layer.parameters()], packed(layer)
    fails_at(monkeypatch, "unpack_codes", call)
    with pytest.raises(torch.OutOfMemoryError):
        layer.quant_method.restore_weights_before_loading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    assert all(map(torch.equal, packed(layer), before))
    assert [p.data_ptr() for p in layer.parameters()] == graph


@AT
@pytest.mark.parametrize("restored", [False, True], ids=["repacked again", "restored first"])
@pytest.mark.parametrize("again", [False, True], ids=["first load", "reload"])
@SOME
def test_repacking_goes_on_where_it_failed(
    method: str, fmt: Any, inter: int, again: bool, restored: bool, call: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    other, _ = repacked_layer(method, fmt, inter)
    layer, _ = host_layer(method, fmt.group_size, fmt.zero_points, inter=inter)
    take_over_loading(layer)
    if again:
        layer.quant_method.process_weights_after_loading(layer)
        layer.quant_method.restore_weights_before_loading(layer)
    fails_at(monkeypatch, "pack_scales", call)
    with pytest.raises(torch.OutOfMemoryError):
        layer.quant_method.process_weights_after_loading(layer)
    if restored:
        layer.quant_method.restore_weights_before_loading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    assert all(map(torch.equal, packed(layer), packed(other)))


@LAYERS
def test_experts_are_turned_a_few_channels_at_a_time(
    method: str, fmt: Any, inter: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits, and 48 channels of w13 at a time, the last fewer; of w2 more."""
    whole, _ = repacked_layer(method, fmt, inter)
    monkeypatch.setattr(packed_weights, "_CODES_AT_ONCE", 48 * HIDDEN)
    sizes: list[int] = []
    monkeypatch.setattr(packing, "pack_codes", counted(packing.pack_codes, sizes))
    monkeypatch.setattr(packing, "unpack_codes", counted(packing.unpack_codes, sizes))
    layer, loaded = repacked_layer(method, fmt, inter)
    assert all(map(torch.equal, packed(layer), packed(whole)))
    layer.quant_method.restore_weights_before_loading(layer)
    for name, parameter in loaded.items():
        assert torch.equal(getattr(layer, name), parameter), name
    assert max(sizes) <= 48 * HIDDEN * (4 / 3 if inter == 96 else 1)  # a depth of 96 is padded


def counted(original: Any, sizes: list[int]) -> Any:
    """A function of the packing that notes how many codes it turns at once."""

    def function(values: torch.Tensor, *args: Any) -> torch.Tensor:
        turned = original(values, *args)
        sizes.append(8 * min(values.nbytes, turned.nbytes) // 4)  # of int32 words
        return turned

    return function


@pytest.mark.parametrize(
    ("method", "shared"),
    [("CompressedTensorsFusedMoEMethod", True), ("GPTQMarlinMoEMethod", True),
     ("MoeWNA16Method", True), ("AWQMoEMethod", False), ("Fp8MoEMethod", False)],
)  # fmt: skip
def test_scales_take_no_memory_twice_where_the_hosts_are_as_large(
    method: str, shared: bool
) -> None:
    fmt = dict(CASES)[method] if method != "MoeWNA16Method" else INT4_G32
    layer, _ = repacked_layer(method, fmt, INTER)
    layer.quant_method.restore_weights_before_loading(layer)
    for name in NAMES:
        kept = getattr(layer, f"{name}_packed_scales")
        assert (scale_parameter(layer, name).data_ptr() == kept.data_ptr()) is shared


def test_a_forward_within_an_update_is_refused() -> None:
    layer, _ = repacked_layer("CompressedTensorsFusedMoEMethod", INT4_G32, INTER)
    layer.quant_method.restore_weights_before_loading(layer)
    with pytest.raises(UnsupportedError, match=r"MoE layer 4: .*weights are being updated.*Fix: "):
        expert_weights(layer)
    layer.quant_method.process_weights_after_loading(layer)
    assert expert_weights(layer).format == INT4_G32


def test_an_update_that_restores_nothing_is_refused_before_it_writes() -> None:
    """From tensors, and over IPC."""
    update = weight_updates.around_update
    layer, _ = repacked_layer("CompressedTensorsFusedMoEMethod", INT4_G32, INTER)
    updater = SimpleNamespace(get_model=lambda: torch.nn.Sequential(layer))
    reached = []

    def original(*_: Any) -> tuple[bool, str]:
        reached.append("written")
        return True, "Success"

    done, message = update(original, updater, [])
    assert (done, reached) == (False, [])
    assert "Fix: call /begin_weight_update first" in message
    layer.quant_method.restore_weights_before_loading(layer)  # as a session begins
    assert update(original, updater, [])[0]
    layer.quant_method.process_weights_after_loading(layer)
    assert not update(original, updater, [])[0]


@pytest.mark.parametrize("sessions", [False, True], ids=["0.5.20", "sessions"])
def test_a_broadcast_into_repacked_experts_is_refused(
    sessions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = SimpleNamespace(UpdateWeightsFromDistributedReqOutput=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", answers)
    layer, _ = repacked_layer("CompressedTensorsFusedMoEMethod", INT4_G32, INTER)
    runner = SimpleNamespace(model=torch.nn.Sequential(layer))
    manager = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
    if sessions:
        manager._session = object()
        manager._select_runners = lambda selector: [(selector, runner)]
    request = SimpleNamespace(selector="target")
    update = weight_updates.around_distributed_update
    assert not update(lambda *_: "reached", manager, request).success
    layer.quant_method.restore_weights_before_loading(layer)
    assert update(lambda *_: "reached", manager, request) == "reached"


def test_a_load_that_does_not_restore_is_restored_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older hosts reload from disk, and roll back where processing failed."""
    layer, loaded = repacked_layer("CompressedTensorsFusedMoEMethod", INT4_G32, INTER)
    before, model = packed(layer), torch.nn.Sequential(layer)
    weight_updates.before_load(model, [], torch.device("cpu"))
    fails_at(monkeypatch, "pack_scales", EXPERTS + 2)
    with pytest.raises(torch.OutOfMemoryError):
        layer.quant_method.process_weights_after_loading(layer)
    weight_updates.before_load(model, [], torch.device("cpu"))
    for name, parameter in loaded.items():
        assert torch.equal(getattr(layer, name), parameter), name
    layer.quant_method.process_weights_after_loading(layer)
    assert all(map(torch.equal, packed(layer), before))
