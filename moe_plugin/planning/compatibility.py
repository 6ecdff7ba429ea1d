"""Which models, formats and features run behind the batched layout, and on whose experts.

The tables are data, read from SGLang 0.5.20 - 0.5.23 and confirmed on one H100: what the host's
own runner cannot do there fails minutes later, after the weights are loaded.
"""

from __future__ import annotations

from typing import Literal

from ..batched_backend import Capability, Mode
from .facts import LaunchFacts, ModelFacts
from .plan import Change, Rejection

Runner = Literal["moe_plugin", "host"]

OUR_FORMATS = frozenset({"unquantized", "fp8_block"})
"""Weight formats that the plugin's experts compute: bf16 (fp32 on CPU), FP8 in 128x128 blocks."""
OUR_ACTIVATIONS = frozenset({"silu"})

FLASHINFER_TILE = "SGLANG_FLASHINFER_PREFILL_SPLIT_TILE_SIZE"

DEEP_GEMM_FORMATS = frozenset({"unquantized", "fp8_block", "fp8_tensor", "fp8_fp4", "mxfp4"})
"""Formats that the host's DeepGEMM runner computes on low-latency dispatch (SM90 and later)."""
HOST_RUNNERS = {
    "deep_gemm": DEEP_GEMM_FORMATS,
    "humming": frozenset({"unquantized", "fp8_block", "fp8_tensor", "fp8_fp4", "mxfp4"}),
    "flashinfer_cutedsl": frozenset({"modelopt_fp4", "modelopt_mixed"}),
    "cutlass": frozenset({"w4afp8"}),
}
"""Explicit ``--moe-runner-backend`` choices that consume low-latency dispatch, and their formats.

Built-in pre-permute or fused functions for ``deepep_ll`` exist for these alone; every other
runner ends in "Pre-permute function ... is not registered" at the first forward.
"""
HOST_AUTO_FORMATS = frozenset({"fp8_block", "fp8_tensor", "fp8_fp4", "w4afp8", "modelopt_fp4"})
"""Formats for which the host's ``auto`` finds such a runner by itself."""

NO_DEEPEP_FORWARD = frozenset(
    {
        "BailingMoeV2_5ForCausalLM", "Cohere2MoeForCausalLM", "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_VLMoeForConditionalGeneration", "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration", "GptOssForCausalLM", "GraniteMoeForCausalLM",
        "GraniteMoeSWAForCausalLM", "GraniteMoeSharedForCausalLM", "Grok1ForCausalLM",
        "Grok1ModelForCausalLM", "HYV3ForCausalLM", "HunYuanMoEV1ForCausalLM",
        "IQuestQ1ForCausalLM", "InklingForConditionalGeneration",
        "InklingForConditionalGenerationMTP", "InternS2MobiusForConditionalGeneration",
        "KimiLinearForCausalLM",
        "LagunaForCausalLM", "Lfm2MoeForCausalLM", "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration", "LongcatFlashForCausalLM", "MixtralForCausalLM",
        "OlmoeForCausalLM", "PhiMoEForCausalLM", "QuantMixtralForCausalLM",
        "SarvamMLAForCausalLM", "SarvamMoEForCausalLM", "Step3VLForConditionalGeneration",
        "TransformersMoEForCausalLM", "TransformersMultiModalMoEForCausalLM", "ZayaForCausalLM",
    }
)  # fmt: skip
"""Architectures of the host with routed experts but no scattered-token forward for DeepEP."""

NO_DISPATCHER = frozenset(
    {"AfmoeForCausalLM", "DbrxForCausalLM", "DeepseekForCausalLM", "XverseMoeForCausalLM"}
)
"""Architectures whose experts no all-to-all backend reaches: they call the fused kernel."""

LEAVE: tuple[Change, ...] = (
    ("--moe-a2a-backend", "none"),
    ("--deepep-mode", None),
    ("--use-batched-dp-moe", "off"),
    ("--enable-waterfill", None),
)
"""Changes that leave batched data-parallel MoE altogether."""
LEAVE_TEXT = "run without it: --moe-a2a-backend none --use-batched-dp-moe off"
LOW_LATENCY: tuple[Change, ...] = (("--deepep-mode", "low_latency"),)


def choose_runner(
    model: ModelFacts, launch: LaunchFacts, capability: Capability
) -> tuple[Runner, list[Rejection]]:
    """Whose experts run this launch, and everything that neither can run."""
    if capability.backend != "deepep":
        # Another backend brings its own experts or takes ours: its distribution decides.
        return "moe_plugin", []
    runner, errors = _runner(model, launch, normal=Mode.EXTEND not in capability.modes)
    return runner, errors + _features(model, launch, runner)


def dispatches_fp8(model: ModelFacts, launch: LaunchFacts) -> bool:
    """Whether DeepEP may carry rows in FP8: as asked, else always but for bf16 weights on our
    experts."""
    if launch.transport != "deepep" or launch.dispatch_dtype not in ("auto", "fp8"):
        return False
    ours_in_bf16 = model.weight_format == "unquantized" and launch.moe_runner_backend == "auto"
    return launch.dispatch_dtype == "fp8" or not ours_in_bf16


def _leave(limit: str, got: str, allowed: str) -> Rejection:
    return Rejection(limit, got, allowed, LEAVE_TEXT, LEAVE, "unsupported")


def _deep_gemm_problem(model: ModelFacts, launch: LaunchFacts) -> str:
    """Why the host's DeepGEMM cannot compute these experts here; empty where it can."""
    capability = launch.compute_capability
    if model.hidden_act.endswith(", clamped"):
        return f"DeepGEMM leaves the clamp of {model.architecture} out"
    if model.hidden_act.endswith(", limited") and model.weight_format == "unquantized":
        return "DeepGEMM leaves the limit of the activation out with bf16 weights"
    if "fp4" in model.weight_format and capability is not None and capability < (10, 0):
        return f"DeepGEMM's FP4 experts need compute capability 10.0, not {_dotted(capability)}"
    if capability is not None and capability < (9, 0):
        return f"DeepGEMM needs compute capability 9.0, this device has {_dotted(capability)}"
    if launch.deep_gemm_switched_off:
        return "SGLANG_ENABLE_JIT_DEEPGEMM switches DeepGEMM off"
    return "" if launch.has_deep_gemm else "DeepGEMM is not installed"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _runner(
    model: ModelFacts, launch: LaunchFacts, *, normal: bool
) -> tuple[Runner, list[Rejection]]:
    """Whose experts, given that prefill also runs DeepEP's normal mode (``normal``) or not."""
    asked, weights = launch.moe_runner_backend, model.weight_format
    problem = _deep_gemm_problem(model, launch)
    if launch.transport == "torch":
        return "moe_plugin", _torch_transport(model, launch)
    if asked == "auto":
        blackwell = launch.compute_capability is not None and launch.compute_capability >= (10, 0)
        # On Blackwell the host repacks block scales into a layout that only DeepGEMM reads.
        ours = weights in OUR_FORMATS and not (blackwell and weights != "unquantized")
        if ours and not normal and model.hidden_act in OUR_ACTIVATIONS:
            return "moe_plugin", _dispatch_dtype(model, launch)
        if normal and weights == "unquantized":
            return "host", [_auto_mode(model, "bf16 weights have no experts for normal dispatch")]
        if weights not in HOST_AUTO_FORMATS:
            return "host", [_no_experts(model)]
        if weights in DEEP_GEMM_FORMATS and problem:
            if normal and ours:
                return "host", [_auto_mode(model, f"normal dispatch needs DeepGEMM: {problem}")]
            return "host", [_without_deep_gemm(model, launch, problem)]
        return "host", _dispatch_dtype(model, launch) if weights in DEEP_GEMM_FORMATS else []
    if weights not in HOST_RUNNERS.get(asked, frozenset()):
        return "host", [_wrong_runner(model, asked)]
    if asked == "deep_gemm" and problem:
        return "host", [_without_deep_gemm(model, launch, problem)]
    return "host", _dispatch_dtype(model, launch) if asked == "deep_gemm" else []


def _dispatch_dtype(model: ModelFacts, launch: LaunchFacts) -> list[Rejection]:
    """Our experts and DeepGEMM's multiply bf16 rows by bf16 weights, and FP8 rows by others."""
    needed = "bf16" if model.weight_format == "unquantized" else "fp8"
    if launch.dispatch_dtype in ("auto", needed):
        return []
    source = launch.dispatch_dtype_source
    return [
        Rejection(
            "dtype of dispatched rows",
            got=f"{launch.dispatch_dtype} ({source}) with {model.weight_format} weights",
            allowed=f"{needed}, which auto selects",
            fix=f"{'remove' if source.startswith('--') else 'unset'} {source}",
            changes=((source, None),),
            kind="unsupported",
        )
    ]


def _auto_mode(model: ModelFacts, why: str) -> Rejection:
    return Rejection(
        "experts for prefill",
        got=f"--deepep-mode auto with {model.weight_format} weights: prefill uses normal dispatch",
        allowed=f"low_latency ({why})",
        fix="--deepep-mode low_latency",
        changes=LOW_LATENCY,
        kind="unsupported",
    )


def _no_experts(model: ModelFacts) -> Rejection:
    got = f"{model.weight_format} weights, activation {model.hidden_act}"
    allowed = f"{sorted(OUR_FORMATS)} with silu, or {sorted(HOST_AUTO_FORMATS)} on the host's own"
    return _leave("experts for the batched layout", got, allowed)


def _without_deep_gemm(model: ModelFacts, launch: LaunchFacts, problem: str) -> Rejection:
    got = f"{model.weight_format} weights on the host's experts; {problem}"
    allowed = "DeepGEMM on SM90 or later"
    if launch.deep_gemm_switched_off:
        variable = "SGLANG_ENABLE_JIT_DEEPGEMM"
        fix = f"unset {variable}"
        limit = "experts for the batched layout"
        return Rejection(limit, got, allowed, fix, ((variable, None),), "unsupported")
    return _leave("experts for the batched layout", got, allowed)


def _wrong_runner(model: ModelFacts, asked: str) -> Rejection:
    able = sorted(name for name, kinds in HOST_RUNNERS.items() if model.weight_format in kinds)
    return Rejection(
        "MoE runner",
        got=f"--moe-runner-backend {asked} with {model.weight_format} weights",
        allowed=f"auto{''.join(f', {name}' for name in able)}: no other consumes "
        "low-latency dispatch",
        fix="--moe-runner-backend auto",
        changes=(("--moe-runner-backend", "auto"),),
        kind="unsupported",
    )


def _torch_transport(model: ModelFacts, launch: LaunchFacts) -> list[Rejection]:
    errors = []
    if launch.moe_runner_backend != "auto":
        errors.append(_wrong_runner(model, launch.moe_runner_backend))
    if model.weight_format != "unquantized" or model.hidden_act not in OUR_ACTIVATIONS:
        got = f"{model.weight_format} weights, activation {model.hidden_act}, torch transport"
        errors.append(_leave("experts for the batched layout", got, "unquantized with silu"))
    if launch.deepep_mode == "auto":
        errors.append(_auto_mode(model, "the torch transport has no normal dispatch"))
    return errors


def _features(model: ModelFacts, launch: LaunchFacts, runner: Runner) -> list[Rejection]:
    """Features of the host that do not go together with it."""
    errors = []
    if model.architecture in NO_DEEPEP_FORWARD:
        errors.append(
            _leave(
                "model",
                f"{model.architecture}, which has no forward over scattered tokens in SGLang",
                "a model with a DeepEP forward (deepseek_v2, qwen3_moe, glm4_moe, ...)",
            )
        )
    capability = launch.compute_capability
    if launch.single_batch_overlap and (
        runner == "moe_plugin" or capability is None or capability < (10, 0)
    ):
        errors.append(
            Rejection(
                "single-batch overlap",
                got="--enable-single-batch-overlap"
                + (f" on compute capability {_dotted(capability)}" if capability else ""),
                allowed="two-batch overlap, or single-batch overlap on Blackwell with the "
                "host's own experts",
                fix="remove --enable-single-batch-overlap",
                changes=(("--enable-single-batch-overlap", None),),
                kind="unsupported",
            )
        )
    if launch.lora:
        errors.append(
            Rejection(
                "LoRA",
                got="--enable-lora or --lora-paths with a batched all-to-all",
                allowed="no adapters: batched experts do not apply them",
                fix=f"remove --enable-lora and --lora-paths, or {LEAVE_TEXT}",
                changes=(("--enable-lora", None), ("--lora-paths", None)),
                kind="unsupported",
            )
        )
    errors += _forwards(model, launch)
    if launch.waterfill and runner == "moe_plugin":
        errors.append(
            Rejection(
                "waterfill",
                got="--enable-waterfill, which adds a shared expert per rank and a top-k slot",
                allowed="routed experts only, or the host's own experts",
                fix="remove --enable-waterfill, or --moe-runner-backend deep_gemm",
                changes=(("--enable-waterfill", None),),
                kind="unsupported",
            )
        )
    return errors


def _forwards(model: ModelFacts, launch: LaunchFacts) -> list[Rejection]:
    """Forwards of the host whose rows no budget bounds, and buffers that two models share."""
    errors = []
    if launch.diffusion:
        got = "--dllm-algorithm, whose blocks are batched outside the chunk"
        errors.append(_leave("rows per rank and forward", got, "autoregressive decoding"))
    if launch.pipeline_warmup and launch.pp_size > 1:
        variable = "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP"
        errors.append(
            Rejection(
                "rows per rank and forward",
                got=f"{variable} runs warm-up batches of up to 64 rows per multiprocessor",
                allowed="forwards within the budgets",
                fix=f"unset {variable}",
                changes=((variable, None),),
                kind="unsupported",
            )
        )
    shape = (model.hidden_size, model.num_experts)
    if launch.draft_shape is not None and launch.draft_shape != shape:
        errors.append(
            Rejection(
                "one buffer for target and draft",
                got=f"a draft with hidden size and experts {launch.draft_shape}, a target with "
                f"{shape}: the first one sizes the buffer of both",
                allowed="equal shapes, or a draft without all-to-all",
                fix="--speculative-moe-a2a-backend none",
                changes=(("--speculative-moe-a2a-backend", "none"),),
                kind="unsupported",
            )
        )
    return errors
