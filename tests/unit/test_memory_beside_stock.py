"""Where the KV cache ends below the stock host's, and where memory is no reason to refuse."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from moe_plugin.integration.resolve.weight_facts import weights_of
from moe_plugin.planning.device_memory import token_bytes
from moe_plugin.planning.memory_record import GIB
from moe_plugin.planning.plan import Plan
from moe_plugin.planning.weight_bytes import Topology, from_shape

from .test_memory_fit import H100, QWEN_30B_BF16, QWEN_235B_FP8, V3_FP8, plan
from .test_weights import FP8, QWEN_30B, QWEN_235B, V3, shape

FEW_LAYERS = from_shape(replace(shape(V3, FP8), layers=4, dense_layers=1))
SMALL_V3 = replace(V3_FP8, weights=FEW_LAYERS)
WIDE = {"tp_size": 16, "attn_dp_size": 1}
TIGHT = {**WIDE, "deepep_mode": "auto", "required": False, "chunked_prefill_size": 8192}


def test_nothing_filled_beyond_the_stock_hosts_makes_its_cache_smaller() -> None:
    """What is typed takes a T of 960 rows, and part of the cache with it: T does not grow further,
    and decode graphs are no larger than the host's own."""
    found = plan(SMALL_V3, 16, max_running_requests=15244, **WIDE, draft_width=1)
    assert found.memory is not None
    assert found.memory.less_than_stock
    assert found.max_dispatch_tokens_per_rank == 960
    assert found.cuda_graph_max_bs_decode <= 512


def test_t_is_the_stock_hosts_own_where_no_t_leaves_as_much() -> None:
    """Here 128 tokens take a little more than the host's slack: 256 would take gigabytes more."""
    decode = {"disaggregation_mode": "decode", "cuda_graph_max_bs_decode": 64}
    model = replace(SMALL_V3, num_experts=384, weight_format="w4afp8")
    found = plan(model, 2, **decode)
    memory = found.memory
    assert memory is not None
    assert memory.less_than_stock
    assert found.max_dispatch_tokens_per_rank == 128
    assert found.budgets[0].arithmetic.startswith("256 leave 39.61 GiB of KV cache, these 45.90")


def test_t_stays_where_a_smaller_one_gains_no_kv_cache_to_speak_of() -> None:
    """16 experts: what 128 tokens save is in the same step of the buffer, and 0.04 GiB of rows."""
    few = from_shape(replace(shape(QWEN_30B), layers=4, experts=16))
    model = replace(QWEN_30B_BF16, num_experts=16, weights=few)
    typed = {"chunked_prefill_size": 64, "cuda_graph_max_bs_decode": 64, "max_running_requests": 64}
    launch = {"attn_dp_size": 1, "prefill_graphs": False, **typed}
    found = plan(model, 2, 40 * GIB, **launch)
    smaller = plan(model, 2, 40 * GIB, max_tokens=128, **launch)
    assert found.memory is not None
    assert smaller.memory is not None
    gained = smaller.memory.kv_cache_bytes - found.memory.kv_cache_bytes
    assert found.memory.less_than_stock
    assert 0 < gained <= found.memory.kv_tolerance_bytes
    assert found.max_dispatch_tokens_per_rank == 256


def refused(fraction: float, **more: Any) -> Plan:
    """A launch whose least estimate is beyond what a typed fraction leaves."""
    found = plan(SMALL_V3, 16, H100, fraction=fraction, **{**TIGHT, **more})
    assert [error.limit for error in found.errors] == ["device memory"]
    return found


@pytest.mark.parametrize(
    ("fraction", "more", "runs"),
    [
        (0.87, {}, True),  # an estimate of activations alone is beyond it
        (0.95, {}, False),  # the buffer at the host's own T is
        (0.87, {"max_tokens": 256}, False),  # who names T asks for us
        (0.87, {"host_tokens_per_rank": 1024}, False),
        (0.885, {"deepep_mode": "low_latency", "chunked_prefill_size": None}, False),
        (0.885, {"deepep_mode": "low_latency", "chunked_prefill_size": 2048}, True),
    ],
)
def test_estimates_refuse_nothing_that_the_stock_host_may_run(
    fraction: float, more: dict[str, Any], runs: bool
) -> None:
    """Only what it takes for certain speaks against it: buffer, workspace, weights, rows."""
    (error,) = refused(fraction, **more).errors
    assert error.host_runs is runs


def test_a_decode_graph_of_zero_is_none_in_the_hosts_estimate() -> None:
    """Typed beside the switch that turns decode graphs off: the host counts no bytes for it."""
    unset, zero = (
        plan(SMALL_V3, 8, decode_graphs=False, cuda_graph_max_bs_decode=graph).memory
        for graph in (None, 0)
    )
    assert unset is not None
    assert zero is not None
    assert zero.stock_fraction > unset.stock_fraction + 0.1


def test_a_decode_instance_keeps_nothing_for_normal_mode() -> None:
    """Whatever the mode: no prefill runs there, and none of its graphs is captured."""
    modes = [
        plan(SMALL_V3, 8, disaggregation_mode="decode", deepep_mode=mode).memory
        for mode in ("auto", "low_latency")
    ]
    kept = [(m.graphs_bytes, m.activations_bytes) for m in modes if m is not None]
    assert len(kept) == 2
    assert kept[0] == kept[1]


def test_rows_of_normal_mode_are_divided_over_the_ranks_of_a_group() -> None:
    """A token's eight copies arrive all over: one rank of sixteen gets half a row of them."""
    found = plan(V3_FP8, 16)
    alone, shared = (
        [token_bytes(found, Topology(attn_tp=ranks), FEW_LAYERS, normal=n) for n in (True, False)]
        for ranks in (1, 16)
    )
    assert alone[0] - alone[1] == pytest.approx(16 * (shared[0] - shared[1]))
    assert alone[0] - alone[1] == 8 * (4 * 7168 + 6 * 2048)


def test_weights_quantised_after_loading_must_fit_before() -> None:
    """Qwen3-235B in bf16 is 120 GiB on a rank of four until it is FP8, half of it, with one layer
    twice meanwhile: an H100 never gets that far, with us or without."""
    text = SimpleNamespace(**QWEN_235B)
    weights = weights_of("nowhere", text, {}, weight_format="fp8_tensor", dtype="bfloat16")
    assert weights is not None
    model = replace(QWEN_235B_FP8, weight_format="fp8_tensor", weights=weights)
    found = plan(model, 4, required=False)
    (error,) = found.errors
    assert error.got.startswith("121.30 GiB")
    assert "while weights are loaded" in error.got
    assert not error.host_runs
    assert error.changes == (("--tp-size", "8"), ("--attn-dp-size", "8"))
    assert plan(model, 8).verdict == "ok"
    # What is planned beside the device's context may be there after all.
    assert found.memory is not None
    small = {**SMALL_GRAPHS, "chunked_prefill_size": 512, "required": False}
    near = plan(model, 4, found.memory.loading_bytes + GIB, **small)
    assert [(e.limit, e.host_runs) for e in near.errors] == [("device memory", True)]
    serialised = replace(weights, before=None)
    assert plan(replace(model, weights=serialised), 4).verdict == "ok"


def test_a_launch_without_experts_on_the_stock_host_is_not_left_to_it() -> None:
    """It has none for bf16 rows but DeepGEMM, which is not chosen by itself; ours compute them."""
    bf16 = replace(SMALL_V3, weight_format="unquantized")
    tight = {**TIGHT, **APART, **SMALL_GRAPHS, "fraction": 0.885}
    own = plan(bf16, 16, H100, **tight)
    theirs = plan(bf16, 16, H100, **tight, moe_runner_backend="deep_gemm")
    assert own.runner == "moe_plugin"
    assert [(e.limit, e.host_runs) for e in own.errors] == [("device memory", False)]
    assert [(e.limit, e.host_runs) for e in theirs.errors] == [("device memory", True)]


APART = {"deepep_mode": "low_latency", "attn_dp_size": 16, "chunked_prefill_size": 2048}
SMALL_GRAPHS = {"cuda_graph_max_bs_decode": 128, "cuda_graph_max_bs_prefill": 128}


@pytest.mark.parametrize(
    ("more", "runs"),
    [
        (SMALL_GRAPHS, True),
        ({**SMALL_GRAPHS, "cuda_graph_max_bs_decode": 256}, False),
        ({**SMALL_GRAPHS, "cuda_graph_max_bs_decode": None}, False),  # it chooses 512
        ({**SMALL_GRAPHS, "cuda_graph_max_bs_decode": None, "max_running_requests": 1600}, True),
        ({**SMALL_GRAPHS, "cuda_graph_max_bs_decode": 256, "decode_graphs": False}, True),
        ({**SMALL_GRAPHS, "cuda_graph_max_bs_prefill": 256}, False),
        ({**SMALL_GRAPHS, "cuda_graph_max_bs_prefill": None}, False),  # up to 2,048 tokens
        ({"cuda_graph_max_bs_decode": 128, "prefill_graphs": False}, True),
        ({**SMALL_GRAPHS, "cuda_graph_max_bs_decode": 256, "draft_width": 4}, True),  # 3 x 4 rows
        ({**SMALL_GRAPHS, "draft_width": 4, "max_running_requests": 4096}, False),
        ({"cuda_graph_max_bs_decode": 128, "surely_captures_prefills": False}, True),
        ({"cuda_graph_max_bs_decode": 256, "deepep_mode": "auto"}, False),
        ({"cuda_graph_max_bs_decode": 128, "deepep_mode": "auto"}, True),
    ],
)
def test_graphs_beyond_the_hosts_own_t_are_not_left_to_it(more: dict[str, Any], runs: bool) -> None:
    """It captures them once weights are loaded, and DeepEP asserts: typed, or its own choice."""
    (error,) = refused(0.885, **{**APART, **more}).errors
    assert error.host_runs is runs
