"""What a user named of graphs, and whether the host captures them for certain."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moe_plugin.integration.resolve.graph_facts import explicit_graph_max


def typed(**more: Any) -> SimpleNamespace:
    """A record of the host with these values."""
    return SimpleNamespace(**{"cuda_graph_config": None, **more})


@pytest.mark.parametrize(
    ("backend", "named", "largest"),
    [
        ("deepep", {}, None),  # the host's ``max_bs or 2048``
        ("deepep", {"cuda_graph_backend_prefill": "breakable"}, None),
        ("deepep", {"cuda_graph_backend_prefill": "full"}, 0),
        ("deepep", {"cuda_graph_config": {"prefill": {"backend": "full"}}}, 0),
        ("deepep", {"cuda_graph_config": {"prefill": {"max_bs": 0}}}, 2048),
        ("nixl", {}, 0),
    ],
)
def test_a_prefill_graph_of_zero_is_unset_where_the_host_takes_it_so(
    backend: str, named: dict[str, Any], largest: int | None
) -> None:
    """Breakable graphs over DeepEP; elsewhere the value is the user's, and nothing is filled."""
    record = typed(cuda_graph_max_bs_prefill=0, **named)
    assert explicit_graph_max(record, "prefill", backend) == largest


def test_a_list_of_sizes_names_the_largest() -> None:
    """Prefills rounded up to eights, as the host rounds them over DeepEP."""
    record = typed(cuda_graph_bs_prefill=[4, 100], cuda_graph_bs_decode=[1, 7])
    assert explicit_graph_max(record, "prefill") == 104
    assert explicit_graph_max(record, "decode") == 7
