"""The models, row counts and byte and operation counts of the kernel benchmarks."""

import sys
from pathlib import Path

from moe_plugin.kernels.formats import Format
from moe_plugin.kernels.launch import Shape

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from kernel_cases import MODELS, Model  # noqa: E402  (found through the path set above)

PACKED_MODELS = (
    Model("Kimi-K2 EP8", 8, 48, 7168, 2048, 8),
    Model("Kimi-K2 EP16", 16, 24, 7168, 2048, 8),
    MODELS[0],
    Model("DeepSeek-V3 EP16", 16, 16, 7168, 2048, 8),
)
"""Whose experts are served in 4 bits."""

TOKENS = 256  # per rank; above it the next deployed capacity
MORE_TOKENS = 1024


def reachable_rows(index: int, tokens: int) -> int:
    """Most rows that every expert can have at once: a token visits top-k experts."""
    model = MODELS[index]
    return tokens * min(model.top_k, model.experts * model.ranks) // model.experts


def model_shape(index: int, weights: Format, rows: int) -> Shape:
    """Layer of one model with the capacity that a mean of `rows` per expert needs."""
    model = MODELS[index]
    tokens = TOKENS if rows <= reachable_rows(index, TOKENS) else MORE_TOKENS
    return Shape(model.experts, tokens * model.ranks, model.hidden, model.inter, weights)


def layer_bytes(shape: Shape, counts: tuple[int, ...]) -> int:
    """Fewest bytes of a layer: the weights of live experts and the live rows, in and out."""
    itemsize = shape.format.row_bits // 8
    live = sum(c > 0 for c in counts)
    weights = 3 * shape.hidden * shape.inter * shape.format.weight_bits // 8
    if shape.format.weight_scale == "block":
        weights += 3 * shape.hidden * shape.inter // 128**2 * 4
    if shape.format.weight_scale == "group":  # a checkpoint's, whose zero points take half a byte
        each = {1: 1, 2: 2, 4: 2.5}[shape.format.scale_bytes]
        weights += int(3 * shape.hidden * shape.inter // shape.format.group_size * each)
    row = shape.hidden * (itemsize + 2) + 2 * shape.inter * itemsize
    return live * weights + sum(counts) * row


def layer_flops(shape: Shape, counts: tuple[int, ...]) -> int:
    """Operations of a layer's three products."""
    return 6 * shape.hidden * shape.inter * sum(counts)
