"""The built-in backends beside DeepEP: modes, bytes, whose experts run, whose names are taken."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from moe_plugin import (
    BatchedBackend,
    CapabilityFacts,
    ConfigError,
    Limits,
    Mode,
    capability,
)
from moe_plugin.backends import BUILT_IN, mooncake, nixl, pplx
from moe_plugin.backends.not_batched import NOT_BATCHED
from moe_plugin.capability import use_batched_dp_moe
from moe_plugin.integration.resolve.exported_variables import export_variables, withdraw_variables
from moe_plugin.planning.facts import LaunchFacts, ModelFacts
from moe_plugin.planning.plan import Plan
from moe_plugin.planning.planner import make_plan
from moe_plugin.planning.weight_formats import FORMATS
from moe_plugin.runtime.stats import Stats
from moe_plugin.runtime.transports.guarded import RowGuard

BOTH = frozenset(Mode)
OTHERS = [name for name in BUILT_IN if name != "deepep"]
SHAPES = [(256, 2048, 8, 128), (1000, 7168, 16, 257), (8, 3584, 2, 2), (1024, 8192, 8, 896)]


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("role", ["null", "prefill", "decode"])
def test_every_forward_is_bounded_unless_the_mode_is_normal(backend: str, role: str) -> None:
    """DeepEP v2 has no such mode; the other three are not built in it."""
    for mode in ("auto", "low_latency", "normal"):
        facts = CapabilityFacts(a2a_backend=backend, deepep_mode=mode, disaggregation_mode=role)
        answer = use_batched_dp_moe(facts)
        bounded = mode != "normal" or backend == "deepep_v2"
        assert answer.modes == (facts.instance_modes() if bounded else frozenset()), mode
        assert answer.backend == backend
        assert answer.ok is bounded


@pytest.mark.parametrize("backend", NOT_BATCHED)
def test_what_is_not_batched_says_why(backend: str) -> None:
    answer = use_batched_dp_moe(CapabilityFacts(a2a_backend=backend))
    assert not answer.ok
    assert f"{backend}: {NOT_BATCHED[backend]}" in answer.reason


@pytest.mark.parametrize(
    ("size", "figures"),
    [
        (nixl.buffer_bytes, [545261696, 14967684480, 466304, 61069080704]),
        (mooncake.buffer_bytes, [541067264, 14770308112, 460832, 60246996992]),
    ],
)
def test_bytes_equal_what_the_libraries_answer(
    size: Callable[..., int], figures: list[int]
) -> None:
    """The size hints of nixl-cu13 1.5.1 and mooncake-transfer-engine-cuda13 0.3.14."""
    assert [size(*shape) for shape in SHAPES] == figures


def test_pplx_buffers_are_one_per_peer_in_a_host_and_more_between_hosts() -> None:
    """Eight peers of fp32 combine rows for every local expert, and six tables of row indices."""
    rows = 16 * 256
    one_host = 8 * (16 + 64 + rows * 4 * 2048 + 6 * 4 * rows)
    assert pplx.buffer_bytes(256, 2048, 8, 128) == one_host
    assert pplx.buffer_bytes(256, 2048, 16, 128) > 2 * one_host


@pytest.mark.parametrize("backend", OTHERS)
def test_every_limit_names_its_source(backend: str) -> None:
    limits = BUILT_IN[backend].limits
    for name in ("max_tokens", "buffer_bytes", "dtypes"):
        assert limits.source(name), name
    for name in ("hidden_sizes", "max_top_k", "device_bytes"):
        assert getattr(limits, name) is None or limits.source(name), name
    assert limits.row_multiple == 1 or limits.source("row_multiple")


def plan(
    backend: str, weights: str = "fp8_block", *, tp: int = 8, dp: int = 8, **launch: object
) -> Plan:
    built_in = BUILT_IN[backend]
    model = ModelFacts(
        hidden_size=2048, num_experts=128, top_k=8, moe_intermediate_size=768,
        context_length=32768, weight_format=weights,
    )  # fmt: skip
    facts = LaunchFacts(
        a2a_backend=backend, transport=backend, tp_size=tp, attn_dp_size=dp,
        whole_rows=built_in.whole_rows, whole_graphs=built_in.whole_graphs, **launch,
    )  # fmt: skip
    return make_plan(model, facts, built_in.limits)


@pytest.mark.parametrize(
    ("backend", "weights", "runner"),
    [
        ("nixl", "unquantized", "moe_plugin"),
        ("nixl", "fp8_block", "moe_plugin"),
        ("nixl", "w4afp8", "host"),
        ("mooncake", "fp8_block", "moe_plugin"),
        ("pplx", "unquantized", "host"),
        ("pplx", "fp8_block", "host"),
        ("deepep_v2", "unquantized", "host"),
    ],
)
def test_whose_experts_run(backend: str, weights: str, runner: str) -> None:
    """Ours behind DeepEP's low-latency output, the host's DeepGEMM behind every other."""
    made = plan(backend, weights)
    assert (made.errors, made.runner) == ((), runner)


def test_deepep_v2_carries_mxfp8_for_blackwells_deep_gemm() -> None:
    assert plan("deepep_v2", "mxfp8", compute_capability=(10, 0)).verdict == "ok"
    assert plan("deepep_v2", "mxfp8", compute_capability=(9, 0)).verdict == "refused"


@pytest.mark.parametrize(
    ("backend", "weights", "launch"),
    [
        ("mooncake", "unquantized", {}),
        ("mooncake", "modelopt_fp4", {"moe_runner_backend": "flashinfer_cutedsl"}),
        ("nixl", "modelopt_fp4", {"moe_runner_backend": "flashinfer_cutedsl"}),
        ("nixl", "fp8_block", {"moe_runner_backend": "humming"}),
        ("nixl", "unquantized", {"moe_runner_backend": "deep_gemm"}),
        ("pplx", "w4afp8", {}),
        ("pplx", "fp8_block", {"has_deep_gemm": False}),
        ("deepep_v2", "fp8_tensor", {}),
        ("deepep_v2", "fp8_block", {"moe_runner_backend": "triton"}),
    ],
)
def test_rows_that_no_experts_read_are_refused(
    backend: str, weights: str, launch: dict[str, object]
) -> None:
    made = plan(backend, weights, **launch)
    assert made.verdict == "refused"
    assert all(error.changes for error in made.errors)


def test_budgets_count_rows_as_the_hosts_checks_do() -> None:
    """Two DP groups over eight ranks: four ranks share a group's rows, but not for those checks."""
    budgets = {
        name: (
            made.chunked_prefill_size // 2,
            made.cuda_graph_max_bs_decode,
            made.max_running_requests // 2,
        )
        for name in OTHERS
        for made in [plan(name, dp=2)]
    }
    assert budgets["nixl"] == budgets["mooncake"] == (1024, 1024, 1024)
    assert budgets["pplx"] == (256, 256, 256)
    assert budgets["deepep_v2"] == (1024, 256, 1024)
    verify = plan("deepep_v2", dp=2, draft_width=4)
    assert verify.cuda_graph_max_bs_decode == 64
    over = plan("deepep_v2", dp=2, max_tokens=128, cuda_graph_max_bs_decode=200)
    assert [error.changes for error in over.errors] == [(("--cuda-graph-max-bs-decode", "128"),)]


def test_a_faulty_distribution_stops_no_launch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever installed it learns why it is missing; the next one is registered all the same."""

    def broken() -> BatchedBackend:
        raise RuntimeError("no such library")

    good = BatchedBackend(name="good", batched_modes=lambda _: BOTH, limits=Limits())
    entries = [
        SimpleNamespace(name="broken", value="theirs:broken", load=lambda: broken),
        SimpleNamespace(name="number", value="theirs:number", load=lambda: int),
        SimpleNamespace(name="good", value="theirs:good", load=lambda: good),
    ]
    monkeypatch.setattr(capability, "entry_points", lambda group: entries)
    monkeypatch.setattr(capability, "_discovered", False)
    monkeypatch.setattr(capability, "_faulty", [])
    try:
        assert capability.backend_names() == [*BUILT_IN, "good"]
    finally:
        capability.unregister_backend("good")
    first, second = capability.faulty_entry_points()
    assert first == "RuntimeError: no such library"
    assert "got int from theirs:number" in second
    assert first in caplog.text


def test_a_built_ins_name_is_not_for_other_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """By entry point never; by code after the built-in was taken out."""
    theirs = BatchedBackend(name="nixl", batched_modes=lambda _: BOTH, limits=Limits())
    entry = SimpleNamespace(name="nixl", value="theirs:backend", load=lambda: theirs)
    monkeypatch.setattr(capability, "entry_points", lambda group: [entry])
    monkeypatch.setattr(capability, "_discovered", False)
    monkeypatch.setattr(capability, "_faulty", [])
    assert capability.get_backend("nixl") is BUILT_IN["nixl"]
    (why,) = capability.faulty_entry_points()
    assert re.search(r"'nixl' of entry point theirs:backend.*built-in", why)
    with pytest.raises(ConfigError, match="already registered"):
        capability.register_backend(theirs)
    ours = capability.unregister_backend("nixl")
    try:
        capability.register_backend(theirs)
        assert capability.get_backend("nixl") is theirs
        assert plan_of_theirs().runner == "moe_plugin"
    finally:
        capability.unregister_backend("nixl")
        capability.register_backend(ours)


def plan_of_theirs() -> Plan:
    """bf16 weights with a runner that the built-in would refuse: theirs to decide."""
    return plan("nixl", "unquantized", moe_runner_backend="deep_gemm")


def test_a_guard_that_sees_no_combines_counts_no_dispatches() -> None:
    """Only DeepEP's transport counts both: one alone would look like a combine that is missing."""
    stats = Stats()
    RowGuard(128, stats=stats).check(4)
    stats.check_calls()
    assert stats.max_rows == {"all": 4}


@pytest.mark.parametrize("weights", [name for name, fmt in FORMATS.items() if fmt.own])
def test_rows_that_our_experts_want_in_bf16_reach_the_variable_of_all_layers(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(nixl.NIXL.bf16_variable or "", raising=False)
    export_variables(plan("nixl", weights))
    exported = os.environ.get(nixl.NIXL.bf16_variable or "")
    withdraw_variables()
    own = FORMATS[weights].own
    assert own is not None
    assert (exported == "1") == (own.rows == "bf16")
