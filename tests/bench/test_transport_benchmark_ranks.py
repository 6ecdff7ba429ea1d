"""The transport benchmark's machinery, on CPU ranks with tiny sizes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "transport"


@pytest.mark.parametrize("ranks", [1, 2])
def test_benchmark_on_cpu_ranks(ranks: int, tmp_path: Path) -> None:
    """Every batch size from 1 to T, every piece, one file with what the figures depend on."""
    argv = ["--cpu", "--ranks", str(ranks), "--calls", "2", "--rounds", "2", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-P", str(FOLDER / "bench.py"), *argv],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / f"transport-torch-{ranks}.json").read_text())
    assert report["environment"]["device"] == "CPU"
    assert " --cpu " in report["command"]
    assert report["ranks"] == ranks
    rows = report["shapes"]["tiny"]["rows"]
    assert [row["tokens"] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        assert set(row["eager"]) == {"dispatch", "experts", "combine", "layer"}
        assert all(0 < f["us"] <= f["slowest_us"] for f in row["eager"].values())
    assert "tiny" in done.stdout


def test_parts_of_a_traced_layer_add_up() -> None:
    """Two layers; the second expert kernel starts while the first runs; a fill in between."""
    breakdown = _load("breakdown")
    kernels = []
    for begin in (0.0, 100.0):
        kernels += [
            breakdown.Kernel("deep_ep::internode_ll::dispatch<false>", begin, begin + 5),
            breakdown.Kernel("deep_ep::internode_ll::dispatch<false>", begin + 6, begin + 10),
            breakdown.Kernel("vectorized_elementwise_kernel<Fill>", begin + 10, begin + 11),
            breakdown.Kernel("experts_kernel", begin + 12, begin + 30),
            breakdown.Kernel("experts_kernel", begin + 25, begin + 40),
            breakdown.Kernel("deep_ep::internode_ll::combine<8>", begin + 41, begin + 50),
            breakdown.Kernel("deep_ep::internode_ll::combine<8>", begin + 52, begin + 60),
        ]
    layers = breakdown.segments(kernels)
    expected = {"dispatch": 11.0, "w13 + activation": 19.0, "w2": 10.0, "combine": 20.0}
    assert layers == [expected, expected]


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"transport_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
