"""What this GPU can do: memory streams and dense matrix products, measured in the same run."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from moe_plugin.kernels.tuning.tune import graph_seconds

STREAM_BYTES = 4 << 30
DENSE = 8192  # rows, columns and depth of a square product


@triton.jit
def _read_kernel(src, sink, blocks, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=4):
        total ^= tl.load(src + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(sink + tl.program_id(0), tl.sum(total, 0))


READERS = ((2, 8192), (4, 4096), (8, 2048))
"""Programs per multiprocessor and words that each reads at once: the fastest counts."""


def _read(src: torch.Tensor, per_sm: int, block: int) -> None:
    """Stream one int32 tensor, and keep nothing of it."""
    grid = per_sm * torch.cuda.get_device_properties(0).multi_processor_count
    sink = torch.empty(grid, dtype=torch.int32, device="cuda")
    _read_kernel[(grid,)](src, sink, src.numel() // block, block)


def read_bytes_per_second() -> float:
    """A read-only stream."""
    src = torch.randint(0, 1 << 30, (STREAM_BYTES // 4,), dtype=torch.int32, device="cuda")
    calls = (partial(_read, src, *reader) for reader in READERS)
    return STREAM_BYTES / min(graph_seconds([call] * 3) for call in calls)


def weights_read_seconds(layers: Sequence[tuple[Any, ...]]) -> float:
    """A plain read of a layer's weights in two launches: what launches and tails alone cost a
    layer of this size. `layers`: copies, so that none is found in L2."""
    words = [[w.view(torch.int32).flatten() for w in (each.w13, each.w2)] for *_, each in layers]

    def both(reader: tuple[int, int], pair: list[torch.Tensor]) -> None:
        for weights in pair:
            _read(weights, *reader)

    return min(
        graph_seconds([partial(both, reader, words[c % len(words)]) for c in range(8)])
        for reader in READERS
    )


def copy_bytes_per_second() -> float:
    """A device-to-device copy, bytes read plus bytes written."""
    src = torch.empty(STREAM_BYTES, dtype=torch.uint8, device="cuda").random_()
    dst = torch.empty_like(src)
    words = src.view(torch.int64), dst.view(torch.int64)
    calls = (lambda: dst.copy_(src), lambda: torch.bitwise_or(words[0], 0, out=words[1]))
    return 2 * STREAM_BYTES / min(graph_seconds([call] * 3) for call in calls)


def dense_flops(fp8: bool) -> float:
    """Dense square product on random data through the library."""
    a = torch.randn(DENSE, DENSE, device="cuda").bfloat16()
    b = torch.randn(DENSE, DENSE, device="cuda").bfloat16()
    if fp8:
        one = torch.ones((), device="cuda")
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        call = lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)  # noqa: E731
    else:
        call = lambda: torch.mm(a, b)  # noqa: E731
    return 2 * DENSE**3 / graph_seconds([call] * 4)


def measure_ceilings() -> dict[str, float]:
    """All four, in TB/s and TFLOP/s."""
    return {
        "copy_TBps": copy_bytes_per_second() / 1e12,
        "read_TBps": read_bytes_per_second() / 1e12,
        "dense_bf16_TFLOPs": dense_flops(False) / 1e12,
        "dense_fp8_TFLOPs": dense_flops(True) / 1e12,
    }
