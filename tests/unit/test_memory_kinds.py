"""Memory of models whose KV cache is not all that the host's fraction leaves: towers, states of
linear attention, windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_plugin.integration.resolve.verification import without_cache
from moe_plugin.planning.memory_record import GIB, MIB
from moe_plugin.planning.report import render

from .test_memory_fit import H100, H200, QWEN_30B_BF16, QWEN_235B_FP8, parts, plan

TOWERS = {"tower_factor": 0.925, "media_bytes": GIB, "stock_media_bytes": GIB}


def test_towers_come_out_of_what_the_kv_cache_would_have() -> None:
    """By the host's factor on its own fraction, and for its caches."""
    without = plan(QWEN_235B_FP8, 8, H200, max_tokens=256).memory
    found = plan(QWEN_235B_FP8, 8, H200, max_tokens=256, **TOWERS)
    memory = found.memory
    assert memory is not None
    assert without is not None
    assert memory.towers_bytes == pytest.approx(
        memory.usable_bytes * without.host_fraction * 0.075, abs=2
    )
    assert memory.media_bytes == GIB
    assert memory.host_fraction == pytest.approx(without.host_fraction * 0.925)
    assert memory.stock_fraction == pytest.approx(without.stock_fraction * 0.925)
    less = without.kv_cache_bytes - memory.kv_cache_bytes
    assert less == pytest.approx(memory.towers_bytes + GIB, abs=memory.usable_bytes // 500)
    assert parts(found) + memory.towers_bytes + GIB <= memory.usable_bytes
    assert "for images, video and audio" in render(found)


def test_no_room_beside_towers_is_refused() -> None:
    """Weights that fit alone, on a device where the host's own fraction leaves them nothing."""
    assert plan(QWEN_235B_FP8, 4, H100).verdict == "ok"
    found = plan(QWEN_235B_FP8, 4, H100, tower_factor=0.8)
    assert found.verdict == "refused"
    (error,) = found.errors
    assert "for images, video and audio" in error.got
    assert error.changes == (("--tp-size", "8"), ("--attn-dp-size", "8"))


def test_a_typed_fraction_keeps_nothing_for_towers() -> None:
    """The host scales only what it chooses; its caches come out of the KV cache all the same."""
    memory = plan(QWEN_235B_FP8, 8, H200, fraction=0.8, **TOWERS).memory
    assert memory is not None
    assert memory.towers_bytes == 0
    static = int(memory.usable_bytes * 0.8)
    assert memory.weights_bytes + memory.kv_cache_bytes + GIB == static


def test_tokens_are_not_counted_where_they_are_not_alike() -> None:
    """Bytes stay, and ``--max-total-tokens`` is of no known size."""
    alike = plan(QWEN_235B_FP8, 8, H200, kv_token_cap=1000).memory
    found = plan(QWEN_235B_FP8, 8, H200, tokens_alike=False, kv_token_cap=1000)
    memory = found.memory
    assert alike is not None
    assert memory is not None
    assert alike.kv_cache_tokens == 1000
    assert (memory.kv_token_bytes, memory.kv_cache_tokens) == (None, None)
    assert memory.kv_cache_bytes == memory.kv_room_bytes > 0
    (line,) = (line for line in render(found).splitlines() if line.startswith("device"))
    assert "tokens" not in line


STATES = {"state_bytes": 600 * MIB, "state_share": 0.9 / 1.9}


@pytest.mark.parametrize("ranks", [4, 8, 16])
@pytest.mark.parametrize("launch", [{}, {"draft_width": 4}, {"max_tokens": 128}])
def test_filled_requests_have_states(ranks: int, launch: dict[str, Any]) -> None:
    """As many as the host would make room for by itself, and never more rows than T."""
    found = plan(QWEN_235B_FP8, ranks, H200, **STATES, **launch)
    memory = found.memory
    assert found.verdict == "ok"
    assert memory is not None
    requests, width = found.max_running_requests // ranks, launch.get("draft_width", 1)
    assert 1 <= requests * width <= found.max_dispatch_tokens_per_rank
    each = STATES["state_bytes"] * (1 + width * (width > 1))
    assert (requests + 1) * each <= memory.kv_room_bytes * STATES["state_share"]
    assert found.cuda_graph_max_bs_decode <= max(8, requests)
    (budget,) = (b for b in found.budgets if b.name == "max_running_requests")
    assert "states" in budget.arithmetic


def test_requests_are_filled_by_t_where_states_have_room() -> None:
    """Small ones change nothing."""
    same = plan(QWEN_30B_BF16, 8, H200)
    found = plan(QWEN_30B_BF16, 8, H200, state_bytes=MIB, state_share=0.4)
    assert found.max_running_requests == same.max_running_requests
    assert found.budgets == same.budgets


def test_typed_requests_are_the_users() -> None:
    """They are no fill, whatever their states take."""
    found = plan(QWEN_235B_FP8, 8, H200, **STATES, max_running_requests=2048)
    assert found.max_running_requests == 2048


def test_without_known_weights_states_take_little() -> None:
    """They take what the host would give them, if weights took three quarters."""
    found = plan(replace(QWEN_30B_BF16, weights=None), 8, H200, **STATES)
    memory = found.memory
    assert memory is not None
    states = (found.max_running_requests // 8 + 1) * STATES["state_bytes"]
    assert states <= memory.kv_room_bytes / 4 * STATES["state_share"] < 2 * states


def test_what_the_host_makes_of_memory_has_to_leave_a_kv_cache() -> None:
    """It may keep more than was planned; a launch of unknown weights is the host's to judge."""
    found = plan(QWEN_235B_FP8, 8, H200)
    assert found.memory is not None
    assert without_cache(found) is None
    spent = replace(found, memory=found.memory.with_room(-GIB))
    error = without_cache(spent)
    assert error is not None
    assert "1.00 GiB more than there is" in error.got
    assert spent.memory is not None
    unknown = replace(spent, memory=replace(spent.memory, weights_source=""))
    assert without_cache(unknown) is None
