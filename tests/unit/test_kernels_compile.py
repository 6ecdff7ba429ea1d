"""Compiled, not run: every architecture has a working path, and on SM90 the intended one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from moe_plugin.kernels.formats import FORMATS, SWIGLU, Activation
from tests.support.kernel_cases import ACTIVATIONS, CANDIDATE_ROWS, DIFFERENT

SUPPORT = Path(__file__).parents[1] / "support"
DEEPSEEK, ONE_EXPERT = (32, 2048, 7168, 2048), (1, 2048, 7168, 2048)
RAGGED = (5, 64, 1152, 176)
MANY_EXPERTS = tuple((experts, 64, 512, 512) for experts in (256, 384, 512))
SM90_BYTES_PER_BLOCK, SM90_BYTES_PER_MULTIPROCESSOR = 232448, 233472
RESERVED_PER_BLOCK = 1024
# Outside the loop over the depth; a spill inside it costs far more than this.
SPILL_BYTES = 256
CANDIDATE_SPILL_BYTES = 1024  # the tuner measures what these cost


def run_program(name: str, argument: str, cwd: Path, **env: str) -> Any:
    """Last line of a support program's output, as JSON."""
    run = subprocess.run(
        [sys.executable, "-P", str(SUPPORT / name), argument],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"} | env,
        cwd=cwd,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def compile_for(
    capability: tuple[int, int], sizes: list, rows: Sequence[int], cwd: Path,
    candidates: bool = False, activations: Iterable[Activation] = (SWIGLU,),
) -> list[dict]:  # fmt: skip
    """What the compiler reports of each distinct kernel, in every format that makes one."""
    each = product(sizes, DIFFERENT, map(asdict, activations))
    shapes = [(*size, name, activation) for size, name, activation in each]
    asked = {"capability": capability, "shapes": shapes, "rows": rows, "candidates": candidates}
    return run_program("compile_kernels.py", json.dumps(asked), cwd)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0)], ids=["sm80", "sm89", "sm100"])
def test_portable_kernels_compile(capability: tuple[int, int], tmp_path: Path) -> None:
    kernels = compile_for(capability, [DEEPSEEK, RAGGED], [8, 64], tmp_path)
    assert {k["format"] for k in kernels} == set(DIFFERENT)
    if capability == (10, 0):
        assert all(k["tcgen05"] for k in kernels)


def check_sm90(kernels: list[dict], spill_bytes: int) -> None:
    for k in kernels:
        room = SM90_BYTES_PER_MULTIPROCESSOR // k["per_sm"] - RESERVED_PER_BLOCK
        assert k["shared"] <= min(room, SM90_BYTES_PER_BLOCK), k
        assert k["wgmma"], k
        assert k["dequantises"] == FORMATS[k["format"]].packed, k
        assert k["tma"], k
        assert not k["serialised"], k
        assert k["spilled"] <= spill_bytes, k
        # The warps of a second launch need not wait, since the rows that they are given have.
        assert k["waits_first"] == k["first"], k


def test_hopper_kernels_fit_and_stay_asynchronous(tmp_path: Path) -> None:
    kernels = compile_for((9, 0), [DEEPSEEK, ONE_EXPERT, RAGGED], [8, 64, 512], tmp_path)
    kernels += compile_for((9, 0), [DEEPSEEK], [16, 32, 256], tmp_path)
    check_sm90(kernels, SPILL_BYTES)


def test_counts_of_many_experts_spill_nothing(tmp_path: Path) -> None:
    """Every warp holds all counts and their running sums: 2 x 16 registers at 512 experts."""
    kernels = compile_for((9, 0), list(MANY_EXPERTS), [8, 64, 512], tmp_path)
    assert {k["experts"] for k in kernels} == {256, 384}  # 384 and 512 are the same kernels
    check_sm90(kernels, SPILL_BYTES)


RICH = ("clamped (Step-3.5, GigaChat)", "scaled, interleaved, bias (gpt-oss)")
"""Activations that between them take every branch of the epilogue."""


@pytest.mark.parametrize("rows", [8, 512])
def test_activations_spill_nothing(rows: int, tmp_path: Path) -> None:
    """Their constants and vectors stand behind the loop."""
    activations = [ACTIVATIONS[name] for name in RICH]
    kernels = compile_for((9, 0), [(4, 64, 1152, 176)], [rows], tmp_path, activations=activations)
    assert {k["activation"] for k in kernels} == set(map(str, activations))
    check_sm90(kernels, SPILL_BYTES)


@pytest.mark.slow
def test_every_candidate_of_the_tuner_fits(tmp_path: Path) -> None:
    kernels = compile_for((9, 0), [DEEPSEEK, ONE_EXPERT], CANDIDATE_ROWS, tmp_path, candidates=True)
    check_sm90(kernels, CANDIDATE_SPILL_BYTES)


def test_kernels_compiled_at_once_are_those_compiled_one_by_one(tmp_path: Path) -> None:
    found = [
        run_program("compile_at_once.py", how, tmp_path, TRITON_CACHE_DIR=str(tmp_path / how))
        for how in ("at once", "one by one")
    ]
    assert found[0] == found[1]
    assert len({kernel for kernel, _ in found[0]}) > 2
