"""Compiled, not run: every architecture has a working path, and on SM90 the intended one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Compiling for a GPU that is absent replaces Triton's driver: a process of its own each time.
CODE = """
import json, re, subprocess, sys
from pathlib import Path
import triton
from moe_plugin.kernels.launch import Device, Shape, heuristic
from moe_plugin.kernels.tuning.precompile import compile_offline
from moe_plugin.kernels.tuning.tune import candidate_launches

major, minor, shapes, rows, tuner = json.loads(sys.argv[1])
device = Device("offline", (major, minor), 132)
ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
found = {}
for shape in (Shape(*s) for s in shapes):
    for m in rows:
        for launch in candidate_launches(shape, m) if tuner else [heuristic(shape, m, device)]:
            pair = compile_offline(shape, launch, device)
            for kernel, tiles in zip(pair, (launch.gate_up, launch.down), strict=True):
                found[kernel.hash] = {
                    "fp8": shape.fp8, "tiles": str(tiles), "per_sm": tiles.per_sm,
                    "counts_parts": kernel is pair[1] and tiles.split > 1,
                    "first": kernel is pair[0],
                    "shared": kernel.metadata.shared, "ptx": kernel.asm["ptx"],
                }
for entry in found.values():
    ptx = entry.pop("ptx")
    entry["wgmma"] = "wgmma.mma_async" in ptx
    entry["tcgen05"] = "tcgen05.mma" in ptx
    entry["tma"] = "cp.async.bulk.tensor" in ptx
    # The code of the multiplying warps comes first, that of the streaming one last.
    entry["waits_first"] = "griddepcontrol.wait" in ptx.partition("wgmma.mma_async")[0]
    if (major, minor) == (9, 0):
        args = [ptxas, "-v", "--gpu-name", "sm_90a", "-o", "/dev/null", "-"]
        Path("k.ptx").write_text(ptx)
        args[-1] = "k.ptx"
        log = subprocess.run(args, capture_output=True, text=True, check=True).stderr
        entry["serialised"] = "serialized" in log
        entry["spilled"] = max(int(n) for n in re.findall(r"(\\d+) bytes spill stores", log))
print(json.dumps(list(found.values())))
"""
DEEPSEEK, MIXTRAL = (32, 2048, 7168, 2048), (1, 2048, 4096, 14336)
RAGGED = (5, 64, 1152, 176)
SM90_BYTES_PER_BLOCK, SM90_BYTES_PER_MULTIPROCESSOR = 232448, 233472
RESERVED_PER_BLOCK = 1024
# Outside the loop over the depth; a spill inside it costs far more than this.
SPILL_BYTES = 256
CANDIDATE_SPILL_BYTES = 1024  # the tuner measures what these cost


def compile_for(
    capability: tuple[int, int], shapes: list, rows: list[int], tuner: bool, cwd: str
) -> list[dict]:
    """What the compiler reports of each distinct kernel."""
    request = json.dumps([*capability, shapes, rows, tuner])
    env = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", CODE, request], capture_output=True, text=True, env=env, cwd=cwd
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0)], ids=["sm80", "sm89", "sm100"])
def test_portable_kernels_compile(capability: tuple[int, int], tmp_path: object) -> None:
    shapes = [(*s, fp8) for s in (DEEPSEEK, RAGGED) for fp8 in (False, True)]
    kernels = compile_for(capability, shapes, [8, 64], False, str(tmp_path))
    assert {k["fp8"] for k in kernels} == {False, True}
    if capability == (10, 0):
        assert all(k["tcgen05"] for k in kernels)


def check_sm90(kernels: list[dict], spill_bytes: int) -> None:
    for k in kernels:
        room = SM90_BYTES_PER_MULTIPROCESSOR // k["per_sm"] - RESERVED_PER_BLOCK
        assert k["shared"] <= min(room, SM90_BYTES_PER_BLOCK), k
        assert k["wgmma"], k
        assert k["tma"], k
        assert not k["serialised"], k
        assert k["spilled"] <= spill_bytes, k
        # Parts of a depth count their arrival in what the launch before has cleared; otherwise the
        # warps of a second launch need not wait, since the rows that they are given have.
        assert k["waits_first"] == (k["first"] or k["counts_parts"]), k


def test_hopper_kernels_fit_and_stay_asynchronous(tmp_path: object) -> None:
    shapes = [(*s, fp8) for s in (DEEPSEEK, MIXTRAL, RAGGED) for fp8 in (False, True)]
    check_sm90(compile_for((9, 0), shapes, [8, 64, 512], False, str(tmp_path)), SPILL_BYTES)


@pytest.mark.slow
def test_every_candidate_of_the_tuner_fits(tmp_path: object) -> None:
    shapes = [(*s, fp8) for s in (DEEPSEEK, MIXTRAL) for fp8 in (False, True)]
    kernels = compile_for((9, 0), shapes, [8, 16, 64, 512], True, str(tmp_path))
    check_sm90(kernels, CANDIDATE_SPILL_BYTES)


AT_ONCE = """
import hashlib, json, sys
import triton
from moe_plugin.kernels.experts import compile_at_once, compile_layer
from moe_plugin.kernels.launch import Device, Shape, heuristic
from moe_plugin.kernels.tuning.precompile import OfflineDriver

device = Device("offline", (9, 0), 132)
triton.runtime.driver.set_active(OfflineDriver(device.capability))
shape = Shape(4, 64, 512, 256, True)
launches = list(dict.fromkeys(heuristic(shape, rows, device) for rows in (1, 64)))
if sys.argv[1] == "at once":
    kernels = compile_at_once(shape, launches, device)
else:
    kernels = [kernel for launch in launches for kernel in compile_layer(shape, launch, device)]
print(json.dumps([[k.hash, hashlib.sha256(k.asm["cubin"]).hexdigest()] for k in kernels]))
"""


def test_kernels_compiled_at_once_are_those_compiled_one_by_one(tmp_path: Path) -> None:
    found = []
    for how in ("at once", "one by one"):
        env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / how)}
        run = subprocess.run(
            [sys.executable, "-P", "-c", AT_ONCE, how], capture_output=True, text=True, env=env
        )
        assert run.returncode == 0, run.stderr[-3000:]
        found.append(json.loads(run.stdout.splitlines()[-1]))
    assert found[0] == found[1]
    assert len({kernel for kernel, _ in found[0]}) > 2
