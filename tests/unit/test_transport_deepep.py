"""What stands before DeepEP's own dispatch, with a stand-in for its buffer."""

from typing import Any

import pytest

from moe_plugin.errors import BudgetError
from moe_plugin.runtime.transports.deepep_ll import refusing_fp8_rows


class Buffer:
    """Records what reaches it."""

    def __init__(self, ranks: int) -> None:
        self.group_size = ranks
        self.calls: list[tuple[Any, ...]] = []

    def low_latency_dispatch(self, *args: Any, **options: Any) -> str:
        self.calls.append((args, options))
        return "sent"


@pytest.mark.parametrize(("ranks", "tokens"), [(1, 64), (1, 136), (8, 8), (2, 96)])
def test_fp8_rows_that_deepep_gets_wrong_are_refused(ranks: int, tokens: int) -> None:
    buffer = refusing_fp8_rows(Buffer)(ranks)
    for options in ({}, {"use_fp8": True}):  # FP8 is DeepEP's default
        with pytest.raises(BudgetError, match=f"got {tokens} on {ranks} ranks"):
            buffer.low_latency_dispatch("x", "ids", tokens, 16, **options)
    assert not buffer.calls
    assert buffer.low_latency_dispatch("x", "ids", tokens, 16, use_fp8=False) == "sent"


@pytest.mark.parametrize(("ranks", "tokens"), [(1, 128), (8, 16), (16, 8), (2, 64), (1, 256)])
def test_everything_else_passes_unchanged(ranks: int, tokens: int) -> None:
    buffer = refusing_fp8_rows(Buffer)(ranks)
    assert buffer.low_latency_dispatch("x", "ids", tokens, 16, return_recv_hook=True) == "sent"
    assert buffer.calls == [(("x", "ids", tokens, 16), {"use_fp8": True, "return_recv_hook": True})]


def test_one_class_per_buffer_class() -> None:
    assert refusing_fp8_rows(Buffer) is refusing_fp8_rows(Buffer)
