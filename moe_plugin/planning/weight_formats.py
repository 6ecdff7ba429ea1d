"""Weight formats of routed experts: one row each, with what computes them on low-latency rows.

A row says what the plugin's experts compute and what the host's do, read from its quantisation
methods and the gate in ``DeepEPMoE.__init__``; ``tests/host/test_host_experts.py`` asks the host's
own classes for every row. A format without a row is one that nobody here knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .plan import Change

ComputeCapability = tuple[int, int]
"""Compute capability of a CUDA device: (major, minor)."""

PLAIN = frozenset({"limited", "clamped"})
"""Marks of :attr:`ModelFacts.hidden_act` that experts of plain SwiGLU would leave out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnExperts:
    """What the plugin's experts compute of a format.

    Attributes:
        rows: dtype of the dispatched rows, the host's name.
        activations: values of :attr:`ModelFacts.hidden_act`.
        below: compute capability from which on the host stores these weights in a layout that
            only its own experts read; None if it never does.
        repacks: they repack the weights once these are loaded.
    """

    rows: str
    activations: frozenset[str] = frozenset({"silu", "silu, limited", "silu, clamped"})
    below: ComputeCapability | None = None
    repacks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HostExperts:
    """How the host computes a format behind DeepEP.

    Attributes:
        runner: the runner whose functions for low-latency rows it calls; "" for a kernel that the
            MoE layer calls without a runner.
        rows: dtypes of low-latency rows that it takes; the first is what ``auto`` selects.
        normal_rows: the same for normal dispatch; empty where it has none.
        activations: it computes one of these, whatever the model asks for.
        leaves_out: marks of the activation that it does not compute, silently.
        deep_gemm: it stands on DeepGEMM, or the layer insists on it.
        least: smallest compute capability; None: no other limit than DeepGEMM's.
    """

    runner: str
    rows: tuple[str, ...]
    normal_rows: tuple[str, ...] = ()
    activations: frozenset[str] = frozenset({"silu", "situ"})
    leaves_out: frozenset[str] = frozenset({"clamped"})
    deep_gemm: bool = False
    least: ComputeCapability | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """One format.

    Attributes:
        name: :attr:`ModelFacts.weight_format`.
        title: what people call it.
        own: the plugin's experts for it; None without.
        host: the host's experts, by the value of ``--moe-runner-backend`` that leads to them;
            every other value ends in an error of the host's, before or in the first forward,
        any_runner: unless its method asks for no runner at all: then this, whatever the value is.
        with_runner: what has to be typed together with an explicit runner.
    """

    name: str
    title: str
    own: OwnExperts | None = None
    host: Mapping[str, HostExperts] = field(default_factory=dict)
    any_runner: HostExperts | None = None
    with_runner: tuple[Change, ...] = ()


def _deep_gemm(
    rows: str, *, least: ComputeCapability | None = None, plain: bool = False
) -> HostExperts:
    return HostExperts(
        runner="deep_gemm",
        rows=(rows,),
        normal_rows=(rows,),
        leaves_out=PLAIN if plain else frozenset({"clamped"}),
        deep_gemm=True,
        least=least,
    )


_BLACKWELL = (10, 0)
_OWN_FP8 = OwnExperts(rows="fp8", below=_BLACKWELL)
_PARTLY = ("awq_marlin", "compressed-tensors", "gptq_marlin", "moe_wna16")
"""Quantizations of which some kinds have rows of their own."""
_OWN_PACKED = OwnExperts(rows="bf16", repacks=True)
_FP8 = _deep_gemm("fp8")
_FP4 = _deep_gemm("fp8", least=_BLACKWELL)
_HUMMING = HostExperts(
    runner="humming",
    rows=("fp8", "bf16"),
    normal_rows=("fp8", "bf16"),
    activations=frozenset({"silu", "gelu"}),
)
_CUTEDSL = HostExperts(
    runner="flashinfer_cutedsl",
    rows=("bf16", "nvfp4"),
    activations=frozenset({"silu", "relu2"}),
    leaves_out=PLAIN,
    least=_BLACKWELL,
)
_W4A8 = HostExperts(
    runner="", rows=("fp8",), normal_rows=("bf16",), leaves_out=PLAIN, deep_gemm=True
)

_ROWS = (
    WeightFormat(
        name="unquantized",
        title="bf16",
        own=OwnExperts(rows="bf16"),
        host=dict.fromkeys(
            # The runners of adapters keep DeepGEMM's layout of the weights, and run it.
            ("deep_gemm", "lora_triton", "lora_cutedsl", "lora_marlin"),
            _deep_gemm("bf16", plain=True),
        ),
    ),
    WeightFormat(
        name="fp8_block",
        title="FP8 in blocks of 128x128",
        own=_OWN_FP8,
        host={"auto": _FP8, "deep_gemm": _FP8},
    ),
    WeightFormat(
        name="fp8_tensor",
        title="FP8 per tensor",
        own=_OWN_FP8,
        host={"auto": _FP8, "deep_gemm": _FP8},
    ),
    WeightFormat(
        name="compressed-tensors_fp8",
        title="FP8 of compressed-tensors: per channel, per tensor, or in blocks of 128x128",
        own=_OWN_FP8,
    ),
    WeightFormat(name="w8a8_fp8", title="FP8 per channel (w8a8_fp8)", own=_OWN_FP8),
    *(
        WeightFormat(name=f"{name}_int4", title=title, own=_OWN_PACKED)
        for name, title in (
            ("compressed-tensors", "int4 in groups of 32 or 128: symmetric compressed-tensors"),
            ("awq_marlin", "AWQ"),
            ("gptq_marlin", "symmetric GPTQ"),
            ("moe_wna16", "moe_wna16"),
        )
    ),
    WeightFormat(
        name="fp8_fp4",
        title="FP4 experts in an FP8 checkpoint",
        own=OwnExperts(rows="bf16", below=_BLACKWELL, repacks=True),
        host={"auto": _FP4, "deep_gemm": _FP4, "humming": _HUMMING},
    ),
    WeightFormat(
        name="fp8_nvfp4",
        title="NVFP4 experts in an FP8 checkpoint",
        host={"flashinfer_cutedsl": _CUTEDSL},
    ),
    WeightFormat(name="mxfp8", title="MXFP8", host={"deep_gemm": _FP4}),
    WeightFormat(name="mxfp4", title="MXFP4", host={"deep_gemm": _FP4}),
    WeightFormat(
        name="modelopt_fp4",
        title="NVFP4",
        host={"flashinfer_cutedsl": _CUTEDSL},
        with_runner=(("--quantization", "modelopt_fp4"),),
    ),
    WeightFormat(
        name="modelopt_mixed",
        title="NVFP4 experts of a mixed ModelOpt checkpoint",
        host={"flashinfer_cutedsl": _CUTEDSL},
        with_runner=(("--quantization", "modelopt_mixed"),),
    ),
    WeightFormat(
        name="w4afp8",
        title="int4 weights with FP8 rows (W4AFP8)",
        host={"auto": _W4A8},
        any_runner=_W4A8,
    ),
    WeightFormat(
        name="humming",
        title="any that --quantization humming reads",
        host={"auto": _HUMMING, "humming": _HUMMING},
    ),
    WeightFormat(
        name="humming_fp4",
        title="FP4 experts under --quantization humming",
        host={"humming": _HUMMING},
    ),
    *(
        # The layer's gate leaves them on the path that asserts in the first forward.
        WeightFormat(name=name, title=f"other {name}" if name in _PARTLY else name)
        for name in (
            "auto-round", "auto-round-int8", "awq", "awq_marlin", "bitsandbytes",
            "blockwise_int8", "compressed-tensors", "gguf", "gptq", "gptq_marlin",
            "minimax_m3_nvfp4", "modelopt", "modelopt_fp8", "modelslim", "moe_wna16",
            "mxfp_w4a8", "nvfp4_online", "petit_nvfp4", "quark", "quark_int4fp8_moe",
            "quark_mxfp4", "w8a8_int8",
        )
    ),
)  # fmt: skip
FORMATS: Mapping[str, WeightFormat] = {row.name: row for row in _ROWS}
"""Every format that has a row, by name."""
