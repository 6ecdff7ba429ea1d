"""What splitting the second GEMM's depth gains with one or two experts on a rank."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from moe_plugin.kernels.formats import Format
from moe_plugin.kernels.launch import Shape, depth_split, heuristic
from moe_plugin.kernels.problem import device_of
from moe_plugin.kernels.tuning.tune import Buffers, measure

FEW_EXPERTS = {
    "DeepSeek-V3, 1 expert": (1, 7168, 2048),
    "DeepSeek-V3, 2 experts": (2, 7168, 2048),
}
CAPACITY = 8192  # rows; float32 parts take capacity x split x hidden x 4 bytes of each expert
SPLITS = (1, 2, 4)


def time_splits(name: str, weights: Format, rows: Sequence[int]) -> list[dict[str, object]]:
    """Microseconds of the layer for every split of its heuristic launch."""
    experts, hidden, inter = FEW_EXPERTS[name]
    shape = Shape(experts, CAPACITY, hidden, inter, weights)
    buffers = Buffers.create(shape)
    device, cells = device_of(buffers.out), []
    for m in rows:
        counts = torch.full((experts,), m, dtype=torch.int32, device="cuda")
        launch = heuristic(shape, m, device)
        times = {
            split: 1e6
            * measure(buffers, counts, replace(launch, down=replace(launch.down, split_k=split)))
            for split in SPLITS
        }
        cells.append({
            "model": name, "format": weights.name, "rows": m, "us": times,
            "chosen": depth_split(experts, hidden),
        })  # fmt: skip
    return cells
