"""How experts' weights are stored and what is computed between their two GEMMs: plain values.

Planning's support table, the dispatch dtype, the workspace and the kernels read these; nothing
here needs torch.
"""

from dataclasses import dataclass
from typing import Literal

SCALE_BLOCK = 128
"""Channels of a row that share a scale as dispatch delivers it, and edge of a weight block."""
FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""
MIN_AMAX = 1e-10
"""Keeps the scale of an all-zero scale group finite and non-zero."""

Code = Literal["integer", "e2m1"]
WeightScale = Literal["none", "block", "channel", "tensor", "group"]


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are stored and rows arrive.

    Attributes:
        name: key of `FORMATS`.
        weight_bits: of one weight.
        row_bits: of one element of a dispatched row; 8 are float8_e4m3fn, with one float32 scale
            per `SCALE_BLOCK` channels.
        weight_scale: what shares a scale: nothing has one, blocks of `SCALE_BLOCK` x `SCALE_BLOCK`,
            an output channel, a whole expert's matrix, or `group_size` inputs of an output
            channel.
        group_size: inputs that share a scale where `weight_scale` is "group".
        zero_points: whether weights are stored with one per scale.
        operand: where the tensor cores take weights from. Narrower ones than rows are
            dequantised in registers, and stored as `packing` orders them.
        code: of 4-bit weights: integers, or sign, two bits of exponent and one of mantissa, whose
            scales are powers of two in a byte (MXFP4).
    """

    name: str
    weight_bits: int
    row_bits: int
    weight_scale: WeightScale = "none"
    group_size: int = 0
    zero_points: bool = False
    operand: Literal["shared", "registers"] = "shared"
    code: Code = "integer"

    @property
    def fp8_rows(self) -> bool:
        """Whether rows arrive, and the activation is stored, in float8_e4m3fn with scales."""
        return self.row_bits == 8

    @property
    def packed(self) -> bool:
        """Whether weights are stored in the order of the registers that dequantise them."""
        return self.operand == "registers"

    @property
    def scale_bytes(self) -> int:
        """Of one group, zero point included, as kernels read it."""
        return 1 if self.code == "e2m1" else 4 if self.zero_points else 2

    @property
    def tuning(self) -> str:
        """Name in tables of measured launches: formats that stream the same bytes share it."""
        return "fp8" if self.weight_bits == 8 else self.name


BF16 = Format("bf16", 16, 16)
FP8_BLOCK = Format("fp8_block", 8, 8, "block")
FP8_CHANNEL = Format("fp8_channel", 8, 8, "channel")
FP8_TENSOR = Format("fp8_tensor", 8, 8, "tensor")
INT4_G32 = Format("int4_g32", 4, 16, "group", 32, operand="registers")
INT4_G128 = Format("int4_g128", 4, 16, "group", 128, operand="registers")
INT4_G32_ZERO = Format("int4_g32_zero", 4, 16, "group", 32, True, "registers")
INT4_G128_ZERO = Format("int4_g128_zero", 4, 16, "group", 128, True, "registers")
MXFP4 = Format("mxfp4", 4, 16, "group", 32, False, "registers", "e2m1")
FORMATS = {
    each.name: each
    for each in (
        BF16, FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, INT4_G32, INT4_G128, INT4_G32_ZERO,
        INT4_G128_ZERO, MXFP4,
    )
}  # fmt: skip
"""What the kernels compute."""


@dataclass(frozen=True, slots=True)
class Activation:
    """What gate g and up u become: g * sigmoid(alpha * g) * (u + beta).

    Attributes:
        kind: what `limit` bounds. "swiglu": g from above and u on both sides, before. In
            "swiglu_clamped" the gate's limit comes after: on g * sigmoid(g).
        alpha: 1 is SiLU.
        beta: added to u after its limit.
        limit: None: there is none.
        bias: whether both GEMMs add one per channel.
        interleaved: whether gate and up rows take turns in w13 and its scales and bias, instead of
            all gates standing before all ups.
    """

    kind: Literal["swiglu", "swiglu_clamped"] = "swiglu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    bias: bool = False
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("swiglu", "swiglu_clamped"):
            raise ValueError(f"activation kind: got {self.kind!r}, allowed swiglu, swiglu_clamped")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit of the activation: got {self.limit}, allowed > 0 or None")
        if self.kind == "swiglu_clamped" and (
            self.limit is None or (self.alpha, self.beta) != (1.0, 0.0)
        ):
            raise ValueError(f"swiglu_clamped: got {self}, allowed a limit, alpha 1 and beta 0")


SWIGLU = Activation()
