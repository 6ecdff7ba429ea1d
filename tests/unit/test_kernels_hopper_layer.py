"""A layer that has run before hands Triton's C launcher what Triton itself would have.

Without a GPU: kernels are compiled, Triton's launcher is the real one, and what reaches its C
functions is looked at.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# Compiling for a GPU that is absent replaces Triton's driver: a process of its own.
CODE = """
import json, sys
import torch, triton
import triton.backends.nvidia.driver as nvidia
from triton.compiler.compiler import CompiledKernel
from moe_plugin.kernels import experts
from moe_plugin.kernels.sm90 import remembered_layer as hopper_layer
from moe_plugin.kernels.launch import Device
from moe_plugin.kernels.tuning.precompile import OfflineDriver

E, M, H, I = json.loads(sys.argv[1])
fp8, what = sys.argv[2] == "fp8", sys.argv[3]
device = Device("offline", (9, 0), 132)
driver = OfflineDriver(device.capability)
launched = []

class CFunctions:  # of Triton's driver
    def launch(self, *args):
        launched.append(args)

    def fill_tma_descriptor_tiled(self, *args):
        return ("map", *args)

    def build_signature_metadata(self, signature):
        return tuple(signature)

def load(kernel):
    if kernel._run is None:
        kernel.function = kernel.hash
        kernel._run = nvidia.CudaLauncher(kernel.src, kernel.metadata)

driver.utils = CFunctions()
triton.runtime.driver.set_active(driver)
nvidia.PyKernelArg = lambda nested_tuple, type: (nested_tuple, type)
nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = range(3)
CompiledKernel._init_handles = load
experts.device_of = lambda tensor: device
dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
skewed = int(what == "misaligned")

def made(*size, dtype=torch.float32):
    return torch.zeros(size, dtype=dtype)

names = {}
def rows(call):
    x = made(E, M, H, dtype=dtype)
    counts = torch.zeros(E + skewed, dtype=torch.int32)[skewed:]
    scale = made(E, H // 128, M).transpose(1, 2) if fp8 else None
    for name, tensor in (("x", x), ("counts", counts), ("x_scale", scale)):
        if tensor is not None:
            names[tensor.data_ptr()] = name
    return x, scale, counts

w13, w2 = made(E, 2 * I, H, dtype=dtype), made(E, H, I, dtype=dtype)
shift = int(what == "misaligned scales")
w13_scale = made(E * 2 * I // 128 * H // 128 + shift)[shift:].view(E, -1, H // 128) if fp8 else None
w2_scale = made(E, H // 128, I // 128) if fp8 else None
for name in ("w13", "w2", "w13_scale", "w2_scale"):
    if globals()[name] is not None:
        names[globals()[name].data_ptr()] = name

def plain(value):
    if isinstance(value, torch.Tensor):
        value = value.data_ptr()
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, int) and value > 2**32:  # an address
        return names.get(value) or fresh.setdefault(value, f"fresh {len(fresh)}")
    return value if isinstance(value, (int, float)) else str(value)

if what == "hooked":
    triton.knobs.runtime.launch_enter_hook.add(lambda metadata: None)
calls, kept = [], []
for call in range(3):
    x, scale, counts = rows(call)
    out = experts.batched_experts(x, scale, w13, w13_scale, w2, w2_scale, counts, 8)
    kept.append((x, scale, counts, out))
    fresh = {out.data_ptr(): "out"}
    calls.append({
        # all but the launch's metadata and its two hooks, which Triton always passes
        "launches": [plain([*args[:8], *args[11:]]) for args in launched],
        "direct": [args[9] is None for args in launched],
    })
    launched.clear()
refused = []
x, scale, counts, _ = kept[-1]
for bad in ((x, scale, counts.long()), (x, scale, counts[:-1]), (x, None if fp8 else x, counts)):
    try:
        experts.batched_experts(bad[0], bad[1], w13, w13_scale, w2, w2_scale, bad[2], 8)
    except AssertionError as error:
        refused.append(str(error))
print(json.dumps({"calls": calls, "refused": refused}))
"""


def run(shape: tuple[int, int, int, int], dtype: str, what: str = "usual") -> dict[str, Any]:
    """What three calls of one layer launch: the same weights, other rows and counts; and what
    bad calls after them are refused for."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE, json.dumps(shape), dtype, what],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("shape", [(4, 64, 256, 384), (1, 64, 512, 1024)], ids=["many", "split"])
def test_direct_launches_equal_tritons(shape: tuple[int, int, int, int], dtype: str) -> None:
    found = run(shape, dtype)
    through_triton, direct, again = found["calls"]
    assert through_triton["direct"] == [False, False]
    assert direct["direct"] == again["direct"] == [True, True]
    assert through_triton["launches"] == direct["launches"] == again["launches"]
    gate_up, down = (str(launch) for launch in direct["launches"])
    for name in ("'x'", "'w13'", "'counts'"):
        assert name in gate_up
    for name in ("'w2'", "'counts'", "'out'"):
        assert name in down
    assert "'x'" not in down
    assert len(found["refused"]) == 3, "a layer that has run before is checked all the same"


@pytest.mark.parametrize(
    ("what", "dtype"), [("misaligned", "bf16"), ("misaligned scales", "fp8"), ("hooked", "bf16")]
)
def test_unusual_calls_go_through_triton(what: str, dtype: str) -> None:
    """Counts or scales that kernels were not compiled for; a profiler that wants to see it."""
    for call in run((4, 64, 256, 384), dtype, what)["calls"]:
        assert call["direct"] == [False, False]
