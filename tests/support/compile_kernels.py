"""A program: compile kernels for a GPU that is absent, and report what the compiler says of each.

Compiling replaces Triton's driver, hence a process of its own. The one argument is JSON:
{"capability": [9, 0], "shapes": [[experts, capacity, hidden, inter, format, activation]],
"rows": [8], "candidates": false}, an activation being its fields. Writes k.ptx into the current
folder; prints a list.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import triton

from moe_plugin.kernels.formats import FORMATS, Activation
from moe_plugin.kernels.launch import Device, Launch, Shape, heuristic
from moe_plugin.kernels.tuning.precompile import compile_offline
from moe_plugin.kernels.tuning.tune import candidate_launches

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def report(kernel: Any, shape: Shape, launch: Launch, first: bool) -> dict[str, Any]:
    """What a test asks of one kernel."""
    tiles = launch.gate_up if first else launch.down
    ptx = kernel.asm["ptx"]
    entry = {
        "format": shape.format.name, "activation": str(shape.activation),
        "experts": shape.experts, "tiles": str(tiles),
        "per_sm": tiles.per_sm, "first": first,
        "shared": kernel.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        # The first operand: registers in braces, or a descriptor of shared memory.
        "dequantises": bool(re.search(r"wgmma\.mma_async[^;]*\}, *\{", ptx)),
        "tcgen05": "tcgen05.mma" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
        # The code of the multiplying warps comes first, that of the streaming one last.
        "waits_first": "griddepcontrol.wait" in ptx.partition("wgmma.mma_async")[0],
    }  # fmt: skip
    if launch.hopper:
        Path("k.ptx").write_text(ptx)
        command = [PTXAS, "-v", "--gpu-name", "sm_90a", "-o", "/dev/null", "k.ptx"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        entry["serialised"] = "serialized" in log
        entry["spilled"] = max(int(n) for n in re.findall(r"(\d+) bytes spill stores", log))
    return entry


def main() -> None:
    """Compile everything that was asked for, once each."""
    asked = json.loads(sys.argv[1])
    device = Device("offline", tuple(asked["capability"]), 132)
    found = {}
    for *sizes, name, activation in asked["shapes"]:
        shape = Shape(*sizes, FORMATS[name], Activation(**activation))
        for rows in asked["rows"]:
            some = [heuristic(shape, rows, device)]
            for launch in candidate_launches(shape, rows) if asked["candidates"] else some:
                pair = compile_offline(shape, launch, device)
                for kernel in pair:
                    if kernel.hash not in found:
                        found[kernel.hash] = report(kernel, shape, launch, kernel is pair[0])
    print(json.dumps(list(found.values())))


if __name__ == "__main__":
    main()
