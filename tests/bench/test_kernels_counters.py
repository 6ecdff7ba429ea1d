"""Hardware counters of the kernel benchmark: what is read of Nsight Compute's table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "kernels"))

import counters

TABLE = """==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","lts__t_bytes.sum.per_second","launch__grid_size"
"","","us","Tbyte/s",""
"0","experts_kernel","1,204.5","5.61","132"
"1","void deep_gemm::sm90_fp8_gemm_1d2d_impl<...>","1,100","n/a","132"
"""


def test_each_kernel_has_its_counters_with_units() -> None:
    assert counters.rows_of(TABLE) == [
        {
            "kernel": "experts_kernel",
            "gpu__time_duration.sum [us]": 1204.5,
            "lts__t_bytes.sum.per_second [Tbyte/s]": 5.61,
            "launch__grid_size []": 132.0,
        },
        {
            "kernel": "void deep_gemm::sm90_fp8_gemm_1d2d_impl<...>",
            "gpu__time_duration.sum [us]": 1100.0,
            "launch__grid_size []": 132.0,
        },
    ]


def test_no_table_is_told_with_what_was_written() -> None:
    with pytest.raises(ValueError, match="LibraryNotLoaded"):
        counters.rows_of("==ERROR== Failed to initialize the profiler: LibraryNotLoaded")
