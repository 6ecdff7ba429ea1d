"""The layers that are measured, and what others published for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One MoE layer over all ranks.

    Attributes:
        name: of the model.
        hidden: H.
        inter: I.
        experts: E, over all ranks.
        top_k: K.
        capacity: T, tokens per rank.
        fp8: weights and dispatch in float8_e4m3fn; combine is bf16 always.
    """

    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    capacity: int
    fp8: bool

    def tokens(self) -> list[int]:
        """1 … T by powers of two, and T."""
        powers = [1 << i for i in range(self.capacity.bit_length())]
        return sorted({*(n for n in powers if n <= self.capacity), self.capacity})

    def message_bytes(self) -> tuple[int, int]:
        """Bytes of one row in dispatch and in combine, counted as DeepEP's own test does."""
        dispatch = self.hidden + self.hidden // 128 * 4 + 16 if self.fp8 else 2 * self.hidden
        return dispatch, 2 * self.hidden


GPU_SHAPES = (
    Shape("DeepSeek-V3", 7168, 2048, 256, 8, 128, fp8=True),
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, 256, fp8=False),
)
CPU_SHAPES = (Shape("tiny", 256, 64, 8, 2, 8, fp8=False),)

# us of dispatch and combine: 128 tokens, hidden 7168, top-8, FP8 dispatch, bf16 combine, EP8.
PUBLISHED = {
    "DeepEP, H800, RDMA (its docs/legacy.md)": (77.0, 114.0),
    "DeepEP, NVLink (measured by pplx-garden, docs/fabric-lib.md)": (42.6, 72.0),
}
