"""A program: compile the kernels of two launches, "at once" or "one by one" (its argument), and
print a hash of each and of its machine code."""

import hashlib
import json
import sys

import triton

from moe_plugin.kernels.experts import compile_at_once, compile_layer
from moe_plugin.kernels.formats import FP8_BLOCK
from moe_plugin.kernels.launch import Device, Shape, heuristic
from moe_plugin.kernels.tuning.precompile import OfflineDriver


def main() -> None:
    """Compile for an absent Hopper."""
    device = Device("offline", (9, 0), 132)
    triton.runtime.driver.set_active(OfflineDriver(device.capability))
    shape = Shape(4, 64, 512, 256, FP8_BLOCK)
    launches = list(dict.fromkeys(heuristic(shape, rows, device) for rows in (1, 64)))
    if sys.argv[1] == "at once":
        kernels = compile_at_once(shape, launches, device)
    else:
        kernels = [kernel for launch in launches for kernel in compile_layer(shape, launch, device)]
    print(json.dumps([[k.hash, hashlib.sha256(k.asm["cubin"]).hexdigest()] for k in kernels]))


if __name__ == "__main__":
    main()
