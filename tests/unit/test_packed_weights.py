"""4-bit weights as the host's methods hold them, repacked: what they stand for stays the same."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_plugin.errors import UnsupportedError
from moe_plugin.integration.resolve.int4_facts import is_int4
from moe_plugin.integration.serve import packed_weights, weight_updates
from moe_plugin.integration.serve.expert_weights import expert_weights, loaded_format
from moe_plugin.integration.serve.marlin_stub import refuse_rows
from moe_plugin.integration.serve.packed_layouts import scale_parameter, stored_codes
from moe_plugin.integration.serve.packed_weights import codes_and_scales, take_over_loading
from moe_plugin.kernels import packing
from moe_plugin.kernels.experts_torch import dequantise_expert_torch
from moe_plugin.kernels.formats import INT4_G32, INT4_G128, INT4_G128_ZERO, MXFP4
from moe_plugin.kernels.packing import E2M1
from moe_plugin.planning.leaving import LEAVE_TEXT

EXPERTS, HIDDEN, INTER = 3, 384, 128
NAMES = ("w13", "w2")
ORDERS = {
    "CompressedTensorsFusedMoEMethod": ("weight_g_idx", "g_idx_sort_indices"),
    "GPTQMarlinMoEMethod": ("g_idx", "g_idx_sort_indices"),
}
"""Parameters of methods whose inputs may be ordered by activation."""
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # the channel that each nibble of AWQ's words holds


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.contiguous(), requires_grad=False)


def words(codes: torch.Tensor, places: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight neighbours of the last dimension in an int32."""
    eights = codes.to(torch.int64).unflatten(-1, (-1, 8))
    packed = sum(eights[..., place] << (4 * at) for at, place in enumerate(places))
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


def in_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Two neighbours of the last dimension in a byte."""
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def host_layer(
    method: str, group: int, zeros: bool, seed: int = 0, inter: int = INTER
) -> tuple[Any, dict[str, torch.Tensor]]:
    """A layer as the method's loader leaves it, and the weights that it stands for."""
    generator = torch.Generator().manual_seed(seed)
    layer = torch.nn.Module()
    layer.layer_id = 4
    layer.moe_runner_config = SimpleNamespace(activation="silu")
    layer.hidden_size, layer.intermediate_size_per_partition = HIDDEN, inter
    nothing = {"restore_weights_before_loading": lambda _method, _layer: None}  # as most have it
    layer.quant_method = type(method, (), nothing)()
    layer.quant_method.quant_config = SimpleNamespace(weight_bits=4, desc_act=False)
    layer.quant_method.is_fp4_expert = method == "Fp8MoEMethod"
    if method == "CompressedTensorsFusedMoEMethod":
        layer.scheme = SimpleNamespace(num_bits=4, actorder=None)
    stands_for = {}
    sizes = {"w13": (2 * inter, HIDDEN), "w2": (HIDDEN, inter)}
    for name, (rows, depth) in sizes.items():
        codes = torch.randint(0, 16, (EXPERTS, rows, depth), generator=generator)
        scale = torch.rand((EXPERTS, rows, depth // group), generator=generator).bfloat16()
        if method == "Fp8MoEMethod":
            scale = torch.exp2((8 * scale.float()).round() - 7)
            values = torch.tensor(E2M1)[codes & 7] * (1 - 2 * (codes >> 3))
            stands_for[name] = values * scale.repeat_interleave(group, -1)
            stored = {"weight": in_bytes(codes).view(torch.int8), "weight_scale_inv": scale}
            for key, tensor in stored.items():
                layer.register_parameter(f"{name}_{key}", parameter(tensor))
            continue
        zero = torch.randint(0, 16, scale.shape, generator=generator)
        middle = zero.repeat_interleave(group, -1) if zeros else 8
        stands_for[name] = (codes - middle) * scale.float().repeat_interleave(group, -1)
        if method == "CompressedTensorsFusedMoEMethod":
            stored = {"weight_packed": words(codes).mT, "weight_scale": scale.mT}
        elif method == "GPTQMarlinMoEMethod":
            stored = {"qweight": words(codes).mT, "scales": scale.mT.half(),
                      "qzeros": words(zero.mT)}  # fmt: skip
        elif method == "AWQMoEMethod":
            stored = {"qweight": words(codes.mT, AWQ_PLACES), "scales": scale.mT,
                      "qzeros": words(zero.mT, AWQ_PLACES)}  # fmt: skip
        else:
            stored = {"qweight": in_bytes(codes), "scales": scale,
                      "qzeros": in_bytes(zero.mT).mT if zeros else torch.empty(0)}  # fmt: skip
        for key, tensor in stored.items():
            layer.register_parameter(f"{name}_{key}", parameter(tensor))
        for key in ORDERS.get(method, ()):
            order = torch.arange(depth, dtype=torch.int32).expand(EXPERTS, depth)
            layer.register_parameter(f"{name}_{key}", parameter(order))
    return layer, stands_for


CASES = [
    ("CompressedTensorsFusedMoEMethod", INT4_G32),
    ("GPTQMarlinMoEMethod", INT4_G128),
    ("AWQMoEMethod", INT4_G128_ZERO),
    ("MoeWNA16Method", INT4_G32),
    ("MoeWNA16Method", INT4_G128_ZERO),
    ("Fp8MoEMethod", MXFP4),
]


@pytest.mark.parametrize(("method", "fmt"), CASES, ids=str)
def test_repacked_weights_are_the_ones_that_were_loaded(method: str, fmt: Any) -> None:
    layer, expected = host_layer(method, fmt.group_size, fmt.zero_points)
    assert loaded_format(layer) == fmt
    kept = [stored_codes(layer, name) for name in NAMES]
    before = [p.data_ptr() for p in kept]
    take_over_loading(layer)
    for _ in range(2):  # the host may ask twice
        layer.quant_method.process_weights_after_loading(layer)
        weights = expert_weights(layer)
        assert weights.format == loaded_format(layer) == fmt
        for expert in range(EXPERTS):
            w13, w2 = dequantise_expert_torch(weights, expert)
            assert torch.equal(w13, expected["w13"][expert])
            assert torch.equal(w2, expected["w2"][expert])
    assert [p.data_ptr() for p in kept] == before, "codes stay in the memory that they had"
    held = sum(p.numel() * p.element_size() for p in layer.parameters())
    weighs = EXPERTS * 3 * HIDDEN * INTER
    assert held == weighs // 2 + weighs // fmt.group_size * fmt.scale_bytes


LAYERS = pytest.mark.parametrize(
    ("method", "fmt", "inter"),
    [*((*case, INTER) for case in CASES), *((*c, 96) for c in CASES if c[1].group_size == 32)],
    ids=str,
)
"""Of both widths; a depth of 96 is padded."""


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


def repacked_layer(method: str, fmt: Any, inter: int, seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A layer after its first load, and what kernels read of it as it was loaded."""
    layer, _ = host_layer(method, fmt.group_size, fmt.zero_points, seed, inter)
    unread = ("idx", "indices", *(["qzeros"] if method == "GPTQMarlinMoEMethod" else []))
    named = {name: p for name, p in layer.named_parameters() if not name.endswith((*unread,))}
    loaded = {name: p.detach().clone() for name, p in named.items()}
    take_over_loading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    return layer, loaded


def packed(layer: Any) -> list[torch.Tensor]:
    """Codes and scales of w13, then of w2; copies."""
    return [tensor.detach().clone() for name in NAMES for tensor in codes_and_scales(layer, name)]


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


UPDATES = {
    "tensor": weight_updates.around_tensor_update,
    "ipc": weight_updates.around_ipc_update,
}


@pytest.mark.parametrize("kind", UPDATES)
def test_an_update_that_restores_nothing_is_refused_before_it_writes(kind: str) -> None:
    layer, _ = repacked_layer("CompressedTensorsFusedMoEMethod", INT4_G32, INTER)
    updater = SimpleNamespace(get_model=lambda: torch.nn.Sequential(layer))
    reached = []

    def original(*_: Any) -> tuple[bool, str]:
        reached.append(kind)
        return True, "Success"

    done, message = UPDATES[kind](original, updater, [])
    assert (done, reached) == (False, [])
    assert "Fix: call /begin_weight_update first" in message
    layer.quant_method.restore_weights_before_loading(layer)  # as a session begins
    assert UPDATES[kind](original, updater, [])[0]
    layer.quant_method.process_weights_after_loading(layer)
    assert not UPDATES[kind](original, updater, [])[0]


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


def test_scales_move_with_their_experts() -> None:
    """Whoever moves experts between ranks takes every parameter that has one row for each."""
    layer, _ = host_layer("CompressedTensorsFusedMoEMethod", 32, False)
    take_over_loading(layer)
    layer.quant_method.process_weights_after_loading(layer)
    moved = {name for name, p in layer.named_parameters() if len(p) == EXPERTS}
    assert moved == {f"{n}_{k}" for n in NAMES for k in ("weight_packed", "packed_scales")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_bits": 8}, "8 bits"),
        ({"actorder": "group"}, "ordered by activation"),
    ],
)
def test_what_kernels_do_not_decode_is_refused(change: dict[str, Any], says: str) -> None:
    layer, _ = host_layer("CompressedTensorsFusedMoEMethod", 32, False)
    vars(layer.scheme).update(change)
    with pytest.raises(
        UnsupportedError, match=rf"MoE layer 4: packed weights: got .*{says}.*Fix: {LEAVE_TEXT}"
    ):
        loaded_format(layer)


def test_zero_points_that_the_host_does_not_transpose_are_refused() -> None:
    """Where asymmetric compressed-tensors keeps them; its codes are repacked, they would not be."""
    layer, _ = host_layer("CompressedTensorsFusedMoEMethod", 32, False)
    layer.w13_weight_zero_point = parameter(torch.zeros(EXPERTS, 12, 32, dtype=torch.int32))
    with pytest.raises(UnsupportedError, match=r"MoE layer 4: packed weights: got .*zero points"):
        loaded_format(layer)


def test_a_layer_whose_scheme_says_no_bits_is_refused() -> None:
    """NVFP4 of compressed-tensors, as a draft may have it."""
    layer, _ = host_layer("CompressedTensorsFusedMoEMethod", 32, False)
    layer.scheme = layer.quant_method.quant_config = SimpleNamespace()
    with pytest.raises(UnsupportedError, match=r"MoE layer 4: packed weights: got .*0 bits"):
        loaded_format(layer)


@pytest.mark.parametrize("again", [False, True], ids=["first load", "reload"])
def test_exponents_that_kernels_do_not_compute_leave_the_layer_as_it_was(again: bool) -> None:
    """Of w2, which comes last; the host then restores, and loads the weights that it had."""
    layer, stands_for = host_layer("Fp8MoEMethod", 32, False, inter=96)
    loaded = {name: p.detach().clone() for name, p in layer.named_parameters()}
    take_over_loading(layer)
    method = layer.quant_method
    if again:
        method.process_weights_after_loading(layer)
        method.restore_weights_before_loading(layer)
    layer.w2_weight_scale_inv.data[1, 2, 2] = 4.0  # 2**(129 - 127)
    says = rf"MoE layer 4: exponent of an FP4 scale of w2: got 129, .*Fix: {LEAVE_TEXT}"
    with pytest.raises(UnsupportedError, match=says):
        method.process_weights_after_loading(layer)
    method.restore_weights_before_loading(layer)
    layer.w2_weight_scale_inv.data[1, 2, 2] = loaded["w2_weight_scale_inv"][1, 2, 2]
    for name, parameter in loaded.items():
        assert torch.equal(getattr(layer, name), parameter), name
    method.process_weights_after_loading(layer)
    for expert in range(EXPERTS):
        found = dequantise_expert_torch(expert_weights(layer), expert)
        for name, weights in zip(NAMES, found, strict=True):
            assert torch.equal(weights, stands_for[name][expert])


def test_rows_that_are_not_ours_lead_out_of_the_plugin() -> None:
    """The host may compute them in another mode; ours are registered in low latency alone."""
    with pytest.raises(UnsupportedError, match=rf"got tuple.*Fix: {LEAVE_TEXT}"):
        refuse_rows(())


COMPRESSED = {
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "weights": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 128}
        }
    },
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("compressed-tensors", COMPRESSED),
        ("awq_marlin", {"bits": 4, "group_size": 128, "zero_point": True}),
        ("gptq_marlin", {"bits": 4, "group_size": 128, "sym": True}),
        ("moe_wna16", {"bits": 4, "group_size": 128}),
    ],
)
def test_plans_leave_out_sizes_that_no_groups_fill(name: str, config: dict[str, Any]) -> None:
    """The host halves such groups, or has one too few: its layer is none of ours."""
    assert is_int4(name, config, (2048, 768))
    assert not is_int4(name, config, (2048, 704))
    assert not is_int4(name, config, (2112, 768))


def test_groups_of_another_size_are_refused() -> None:
    layer, _ = host_layer("CompressedTensorsFusedMoEMethod", 64, False)
    with pytest.raises(UnsupportedError, match="groups of 64"):
        loaded_format(layer)
