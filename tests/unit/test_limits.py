"""DeepEP's limits as data: exact bytes, every bound with its source, both transports."""

from __future__ import annotations

import pytest

from moe_plugin.backends.deepep import (
    DEEPEP_LIMITS,
    NVSHMEM_FIXED_BYTES,
    NVSHMEM_GRANULE,
    TORCH_LIMITS,
    device_bytes,
    limits_of,
    low_latency_rdma_bytes,
)
from moe_plugin.capability import get_backend
from moe_plugin.planning.limits import Limits
from moe_plugin.planning.memory import (
    DTYPE_BYTES,
    UNSPLIT,
    allocated,
    handle_sizes,
    received_sizes,
    workspace_bytes,
)

GIB = 1 << 30


@pytest.mark.parametrize("ranks", [1, 2])
def test_bytes_equal_one_seen_hint(ranks: int) -> None:
    """``Buffer.get_low_latency_rdma_size_hint(128, 2048, ranks, 8)`` on an H100."""
    assert low_latency_rdma_bytes(128, 2048, ranks, 8) == 17_039_744


@pytest.mark.parametrize(
    ("experts", "hidden", "tokens", "gib"),
    [
        (256, 7168, 128, 1.78),
        (256, 7168, 1024, 14.22),
        (288, 7168, 256, 4.00),
        (384, 7168, 1024, 21.33),  # sglang#29942 died with this figure
        (448, 5120, 2048, 35.55),  # vllm#57894 likewise
        (128, 2048, 256, 0.51),
    ],
)
def test_bytes_equal_reported_figures(experts: int, hidden: int, tokens: int, gib: float) -> None:
    """Figures from two user reports, and of a buffer that DeepEP made."""
    assert low_latency_rdma_bytes(tokens, hidden, 8, experts) / GIB == pytest.approx(gib, abs=0.005)


def test_device_bytes_are_whole_granules_and_a_fixed_cost() -> None:
    """NVSHMEM's heap grows by 512 MiB; 5264 MiB were taken for a buffer of 520 MiB."""
    assert device_bytes(1) == NVSHMEM_FIXED_BYTES + (512 << 20)
    assert device_bytes(512 << 20) == NVSHMEM_FIXED_BYTES + (512 << 20)
    assert device_bytes((512 << 20) + 1) == NVSHMEM_FIXED_BYTES + GIB
    # What the servers of one rank took, on an H200 and on an H100.
    for taken in (5264 << 20, 5270 << 20):
        planned = device_bytes(low_latency_rdma_bytes(256, 2048, 1, 128))
        assert taken <= planned <= taken + NVSHMEM_GRANULE


@pytest.mark.parametrize(
    ("ranks", "ok"), [(1, True), (6, True), (7, True), (8, True), (12, False), (16, True)]
)
def test_rank_counts(ranks: int, ok: bool) -> None:
    """Fewer than 8, or a multiple of 8."""
    assert DEEPEP_LIMITS.ranks_ok(ranks) is ok
    assert TORCH_LIMITS.ranks_ok(ranks)


def test_fp8_rows_need_coarser_tokens() -> None:
    """128 over the ranks, and never less than what graphs need."""
    multiples = {r: DEEPEP_LIMITS.token_multiple(r, 8, fp8=True) for r in (1, 2, 4, 6, 8, 16, 64)}
    assert multiples == {1: 128, 2: 64, 4: 32, 6: 64, 8: 16, 16: 8, 64: 8}
    assert DEEPEP_LIMITS.token_multiple(1, 8, fp8=False) == 8


def test_every_deepep_limit_names_its_source() -> None:
    """So that a doubt can be looked up."""
    for name in ("max_tokens", "hidden_sizes", "max_top_k", "max_buffer_bytes", "qp_depth",
                 "ranks", "row_multiple", "fp8_row_multiple", "dtypes"):  # fmt: skip
        assert DEEPEP_LIMITS.source(name), name


def test_qp_depth_covers_the_default_depth_up_to_511() -> None:
    """``>= 2 (T + 1)``."""
    assert DEEPEP_LIMITS.qp_depth is not None
    assert DEEPEP_LIMITS.qp_depth(511) == DEEPEP_LIMITS.default_qp_depth == 1024
    assert DEEPEP_LIMITS.qp_depth(512) == 1026


@pytest.mark.parametrize("experts", [8, 384, 448, 896, 4096])
def test_largest_tokens_is_the_last_that_fits(experts: int) -> None:
    """Bisection against the definition."""
    hidden = 7168
    most = DEEPEP_LIMITS.largest_tokens(hidden, 8, experts, 8)
    bound = DEEPEP_LIMITS.max_buffer_bytes
    assert bound is not None
    assert most % 8 == 0
    assert low_latency_rdma_bytes(most, hidden, 8, experts) < bound
    if most < 1024:
        assert low_latency_rdma_bytes(most + 8, hidden, 8, experts) >= bound


def test_torch_transport_replaces_deepeps_limits_only() -> None:
    """A third party's backend keeps its own, whatever the transport is called."""
    deepep = get_backend("deepep")
    assert limits_of(deepep, "torch") is TORCH_LIMITS
    assert limits_of(deepep, "deepep") is DEEPEP_LIMITS
    assert TORCH_LIMITS.hidden_sizes is None
    assert TORCH_LIMITS.max_tokens == 1024
    assert Limits(max_tokens=4100).largest_tokens(64, 1, 8, 8) == 4096  # no other limit binds


def test_workspace_is_rows_times_their_widths() -> None:
    """bf16: 2H + I per row, 2 bytes each; the host's runner also stores gate and up."""
    rows = 256 * 128
    handle = 4 * rows + 1024 + 512
    for ranks in (1, 8):  # 16 counts take a block of 512 bytes as 128 do
        assert sum(map(allocated, handle_sizes(rows, 128, 128 // ranks))) == handle
    for dtype in ("bfloat16", "float32"):
        ours = workspace_bytes(128, 256, 2048, 768, dtype) - handle
        assert ours == rows * (2 * 2048 + 768) * DTYPE_BYTES[dtype] + 3 * UNSPLIT
    host = workspace_bytes(128, 256, 2048, 768, "bfloat16", host=True) - handle
    assert host == rows * (2 * 2048 + 3 * 768) * 2 + 4 * UNSPLIT
    assert received_sizes(10, 256, "bfloat16", fp8=True) == (10 * 256, 10 * 8)


def test_allocated_bounds_what_the_allocator_took() -> None:
    """A layer of the DeepEP tests on one rank: 16 experts, T = 128, H = 2048, I = 256.

    Its peaks on a GPU were these. A tensor of 33 MiB + 16 KiB once had a block of 34 MiB.
    """
    for fp8, peak in ((False, 17_835_008), (True, 13_263_872)):
        planned = workspace_bytes(16, 128, 2048, 256, "bfloat16", fp8=fp8)
        assert peak <= planned <= peak + 3 * UNSPLIT
    assert allocated(33 * 2**20 + 16384) >= 34 * 2**20
    assert [allocated(size) for size in (1, 513, 2**20)] == [512, 1024, 2**20]
