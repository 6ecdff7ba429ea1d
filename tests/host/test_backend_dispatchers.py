"""The host's dispatchers of the other batched backends, with our experts and our guard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from moe_plugin.backends import BUILT_IN

from ..support.hosts import ROOT, host_result, program

CAPACITY = 8


@pytest.fixture(scope="module")
def result() -> Mapping[str, Any]:
    others = [backend for name, backend in BUILT_IN.items() if name != "deepep"]
    env = {f"{backend.limits.tokens_variable}": f"{CAPACITY}" for backend in others}
    env |= {"PYTHONPATH": str(ROOT / "tests")}
    found: Mapping[str, Any] = host_result(program("masked_backends"), env=env)
    return found


def test_our_experts_compute_what_nixl_and_mooncake_deliver(result: Mapping[str, Any]) -> None:
    """Through the host's dispatch and combine; errors over the bound of the layer's dtype."""
    assert set(result["errors"]) == {"mooncake fp8", "nixl bf16", "nixl fp8"}
    assert all(error <= 1 for error in result["errors"].values()), result["errors"]


@pytest.mark.parametrize("backend", ["nixl", "mooncake", "pplx", "deepep_v2"])
def test_more_rows_than_t_raise_before_anything_is_sent(
    result: Mapping[str, Any], backend: str
) -> None:
    """By ``dispatch`` and by ``dispatch_a``, in one shape for every backend."""
    answers = result["refusals"][backend]
    calls = ["dispatch"] if backend == "deepep_v2" else ["dispatch", "dispatch_a"]
    assert [*answers] == [*calls, "plan"]
    for call in calls:
        assert answers[call].startswith("BudgetError: tokens in one all-to-all dispatch")
        assert f"got {CAPACITY + 1} on this rank, allowed <= {CAPACITY}. Fix:" in answers[call]


@pytest.mark.parametrize("backend", ["nixl", "mooncake", "pplx", "deepep_v2"])
def test_a_dispatcher_of_another_t_than_planned_is_refused(
    result: Mapping[str, Any], backend: str
) -> None:
    """As in a scheduler that did not inherit the variable."""
    assert result["refusals"][backend]["plan"].startswith(
        f"HostMismatchError: tokens per rank of the host's {backend} dispatcher: got 8, allowed 64"
    )


def test_one_buffer_is_made_once_the_kv_cache_is_there(result: Mapping[str, Any]) -> None:
    """The host takes the KV cache from what is free; pplx-kernels' is its own affair."""
    assert result["buffers"] == {"nixl": [0, 1], "mooncake": [0, 1], "pplx": [0, 0]}
