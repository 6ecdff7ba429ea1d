"""Stage `trace` of the serving benchmark: kernels of a trace by kinds, and the time they cover."""

from __future__ import annotations

import gzip
import json
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path += [
    str(Path(__file__).parents[2] / "benchmarks" / "serving"),
    str(Path(__file__).parents[2] / "benchmarks"),
    str(Path(__file__).parents[1] / "support"),
]
import traces


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("experts_kernel", "experts"),
        ("void deep_ep::internode_ll::dispatch<true, false, 7168>(...)", "all-to-all"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("void sglang::cross_device_reduce_1stage<__nv_bfloat16, 2>(...)", "collectives"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>", "attention"),
        ("_fwd_grouped_kernel_stage1", "attention"),
        ("deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, (deep_gemm::GemmType)2, 0>", "experts"),
        ("deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, (deep_gemm::GemmType)0, 0>", "dense products"),
        ("fused_moe_kernel", "experts"),
        ("nvjet_tst_128x64_64x8_1x2_h_bz_TNT", "dense products"),
        ("rmsnorm_kernel", "other"),
    ],
)
def test_a_kernels_kind_is_told_by_its_name(kernel: str, kind: str) -> None:
    assert traces.kind_of(kernel) == kind


def test_overlapping_kernels_keep_the_gpu_busy_once() -> None:
    """Microseconds 0-100 and 50-150 of two streams, then 400-500: 250 busy of 500."""
    found = traces.summarised([
        {"cat": "kernel", "name": "nvjet", "ts": 1050.0, "dur": 100.0},
        {"cat": "kernel", "name": "experts_kernel", "ts": 1000.0, "dur": 100.0},
        {"cat": "gpu_memcpy", "name": "Memcpy", "ts": 1400.0, "dur": 100.0},
        {"cat": "cpu_op", "name": "nvjet", "ts": 0.0, "dur": 9000.0},
        {"name": "process_name"},
    ])  # fmt: skip
    kinds = {"experts": 0.1, "dense products": 0.1, "other": 0.1}
    assert found["ms"] == {"whole": 0.5, "busy": 0.25, **kinds}


def test_a_trace_is_read_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rank.trace.json.gz"
    events = [{"cat": "kernel", "name": f"kernel {i}", "ts": i, "dur": 1} for i in range(1000)]
    whole = gzip.compress(json.dumps({"traceEvents": events}).encode())

    def write() -> None:
        with path.open("wb") as file:
            for start in range(0, len(whole), len(whole) // 3):
                file.write(whole[start : start + len(whole) // 3])
                file.flush()
                time.sleep(0.6)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert len(traces._events(traces._written(tmp_path, 1)[0])) == len(events)
    finally:
        writer.join()


def test_every_rank_has_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "LONGEST_WRITE_S", 2.5)
    (tmp_path / "rank0.trace.json.gz").write_bytes(b"one of two")
    with pytest.raises(OSError, match="1 of 2 traces"):
        traces._written(tmp_path, 2)
