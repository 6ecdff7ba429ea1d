"""A repeated launch hands the compiled kernel what Triton's own launcher would, and costs less.

Without a GPU: kernels are compiled, and what would be launched is looked at.
"""

import json
import os
import subprocess
import sys

import pytest

# Compiling for a GPU that is absent replaces Triton's driver: a process of its own.
CODE = """
import json, sys
import torch, triton
from triton.compiler.compiler import CompiledKernel
from moe_plugin.kernels import experts, hopper_launch
from moe_plugin.kernels.launch import Device
from moe_plugin.kernels.precompile import OfflineDriver

E, M, H, I = json.loads(sys.argv[1])
fp8, skewed = sys.argv[2] == "fp8", int(sys.argv[3] == "misaligned")
device = Device("offline", (9, 0), 132)
triton.runtime.driver.set_active(OfflineDriver(device.capability))
experts.device_of = lambda tensor: device
launched = []

class Launcher:
    def __call__(self, *args):
        launched.append(args)

CompiledKernel._init_handles = lambda self: None
CompiledKernel.run = property(lambda self: Launcher(), lambda self, value: None)
dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16

def tensors():
    x, w13, w2 = (torch.empty(s, dtype=dtype) for s in ((E, M, H), (E, 2 * I, H), (E, H, I)))
    counts = torch.zeros(E + skewed, dtype=torch.int32)[skewed:]
    if not fp8:
        return x, None, w13, None, w2, None, counts
    scales = [torch.empty(s) for s in ((E, H // 128, M), (E, 2 * I // 128, H // 128),
                                       (E, H // 128, I // 128))]
    return x, scales[0].transpose(1, 2), w13, scales[1], w2, scales[2], counts

def call():
    args = tensors()
    experts.batched_experts(*args, 8)
    return args

kept = [call() for _ in range(3)]

def plain(value):
    if hasattr(value, "block_shape"):
        return {k: str(v) for k, v in value.__dict__.items() if k != "base"}
    if isinstance(value, torch.Tensor):
        return [list(value.shape), list(value.stride()), str(value.dtype)]
    return str(value)

def bases(args):
    return [a.base.data_ptr() for a in args if hasattr(a, "block_shape")]

def summary(args):
    # x, y, z, stream, function, packed metadata, launch metadata, two hooks, then the arguments
    return [str(a) for a in args[:6]] + [plain(a) for a in args[9:]]

fast = [launch._compiled is not None for launch in hopper_launch._LAUNCHES.values()]
print(json.dumps({
    "launches": [summary(args) for args in launched],
    "bases": [bases(args) for args in launched],
    "inputs": [[t[0].data_ptr(), t[2].data_ptr(), t[4].data_ptr()] for t in kept],
    "fast": fast,
}))
"""


def launches(shape: tuple[int, int, int, int], dtype: str, counts: str = "aligned") -> dict:
    """What three calls of one layer would launch, two launches each."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", CODE, json.dumps(shape), dtype, counts],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("shape", [(4, 64, 256, 384), (1, 64, 512, 1024)], ids=["many", "split"])
def test_a_repeated_launch_equals_the_first(shape: tuple[int, int, int, int], dtype: str) -> None:
    found = launches(shape, dtype)
    first, second, third = (found["launches"][2 * call : 2 * call + 2] for call in range(3))
    assert found["fast"] == [True, True]
    assert first == second == third
    for call in range(3):
        x, w13, w2 = found["inputs"][call]
        gate_up, down = found["bases"][2 * call : 2 * call + 2]
        assert gate_up[:3] == [w13, x, x], "each call describes its own tensors"
        assert down[0] == w2
        assert x not in down


def test_misaligned_counts_go_through_triton_each_time() -> None:
    found = launches((4, 64, 256, 384), "bf16", "misaligned")
    assert found["fast"] == [False, False]
