"""Config and metadata of the MoE layer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_plugin.errors import ConfigError
from moe_plugin.kernels.weights import ExpertWeights
from moe_plugin.runtime.config import BatchedMoEConfig
from moe_plugin.runtime.metadata import DPMetadata, rows_to_launch_for
from moe_plugin.runtime.runner import BatchedMoERunner, expected_rows

GOOD = {
    "num_experts": 16,
    "num_ranks": 4,
    "top_k": 2,
    "hidden_size": 64,
    "intermediate_size": 32,
    "max_num_tokens": 256,
}


def test_derived_sizes() -> None:
    """Local experts and capacity follow from experts, ranks and T."""
    config = BatchedMoEConfig(**GOOD)
    assert (config.num_local_experts, config.capacity) == (4, 1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_num_tokens": 0}, "max_num_tokens: got 0, allowed >= 1.*--batched-dp-moe-max-tokens"),
        ({"max_num_tokens": -1}, "got -1"),
        ({"num_experts": 18}, "18 experts over 4 ranks.*--ep-num-redundant-experts"),
        ({"top_k": 0}, "top_k: got 0"),
    ],
)
def test_bad_config_is_one_clear_error(change: dict, message: str) -> None:
    """An error with got, allowed and fix, never an assert."""
    with pytest.raises(ConfigError, match=message):
        BatchedMoEConfig(**(GOOD | change))


@pytest.mark.parametrize(
    ("tokens", "attn_tp", "sizes"),
    [
        ([5, 0], 1, (5, 0)),
        ([5, 3], 2, (3, 3, 2, 2)),
        ([8], 4, (2, 2, 2, 2)),
    ],
)
def test_sp_local_sizes(tokens: list[int], attn_tp: int, sizes: tuple[int, ...]) -> None:
    """Tokens of a data-parallel group are scattered over its attention-TP ranks, rounded up."""
    metadata = DPMetadata.from_global_num_tokens(tokens, attn_tp)
    assert metadata.sp_local_sizes == sizes
    assert metadata.max_tokens == max(sizes)


def test_expected_rows_is_a_mean_and_at_least_one() -> None:
    """64 tokens x top-8 over 256 experts: 2 rows; an idle forward still asks for one."""
    assert DPMetadata((32, 32)).expected_rows(8, 256) == 2
    assert DPMetadata((0, 0)).expected_rows(8, 256) == 1


def test_a_decode_graph_may_get_rows_of_groups_that_prefill_beside_it() -> None:
    """Not counted for so few tokens that few experts have rows at all; 4 ranks of 128 experts,
    top-8, T = 1024: three groups bring 192 rows, and two where attention TP makes one of two."""
    config = BatchedMoEConfig(
        num_experts=128, num_ranks=4, top_k=8, hidden_size=64, intermediate_size=64,
        max_num_tokens=1024,
    )  # fmt: skip
    beside = replace(config, other_ranks=3)
    found = {tokens: rows_to_launch_for(None, tokens, beside) for tokens in (1, 3, 4, 64, 1024)}
    assert found == {1: (1, 0), 3: (1, 0), 4: (1, 192), 64: (16, 192), 1024: (256, 192)}
    joined = rows_to_launch_for(None, 64, replace(config, other_ranks=2))
    assert joined == (16, 128)
    assert rows_to_launch_for(None, 64, config) == (16, 0)


@pytest.mark.parametrize(
    ("asked", "given", "same_bits"),
    [(1, 1, False), (128, 128, False), (129, 128, False), (1, 128, True), (129, 128, True)],
)
def test_rows_are_expected_that_kernels_were_compiled_for(
    asked: int, given: int, same_bits: bool
) -> None:
    """The host's own estimate rounds a full batch up to one row more; a batch-invariant layer has
    one launch."""
    config = BatchedMoEConfig(**GOOD, batch_invariant=same_bits)
    assert expected_rows(config) == range(128 if same_bits else 1, 129)
    runner = BatchedMoERunner(config, lambda *args, beside_m: (args[-1], beside_m))
    weights = ExpertWeights(None, None)  # type: ignore[arg-type]
    got = runner.run_experts(None, None, None, weights, asked, 128)  # type: ignore[arg-type]
    assert got == (given, 0 if same_bits else 128)
