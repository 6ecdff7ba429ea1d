"""Which models, formats and features run behind the batched layout, and on whose experts.

The tables are data: :mod:`weight_formats` and :mod:`host_models`, read from SGLang 0.5.23. What
the host's own experts cannot do fails minutes later there, after the weights are loaded.
"""

from __future__ import annotations

from dataclasses import replace

from ..backends import BUILT_IN
from ..batched_backend import Capability, Mode
from ..capability import get_backend
from .backend_experts import host_experts, rows_for_experts
from .expert_choice import (
    EXPERTS,
    Runner,
    choose_experts,
    decodes_on_own,
    dotted,
)
from .facts import LaunchFacts, ModelFacts, fused_flags
from .host_models import (
    MOVES_BY_NAME,
    NO_REDUNDANT,
    PLAIN_EXPERTS,
    REFUSED_BY_HOST,
    UNPROVEN,
    WRONG_SUMS,
)
from .leaving import LEAVE_TEXT, LOW_LATENCY, leave
from .load_formats import check_load_format
from .plan import Rejection
from .weight_formats import FORMATS

FLASHINFER_TILE = "SGLANG_FLASHINFER_PREFILL_SPLIT_TILE_SIZE"


def choose_runner(
    model: ModelFacts, launch: LaunchFacts, capability: Capability
) -> tuple[Runner, list[Rejection]]:
    """Whose experts run this launch, and everything that neither can run."""
    backend = get_backend(capability.backend)
    if BUILT_IN.get(backend.name) is not backend:
        # Another's backend brings its own experts or takes ours: its distribution decides.
        return "moe_plugin", []
    if backend.host_formats:
        return "host", host_experts(model, launch, backend) + _features(model, launch)
    if launch.transport == "torch":
        errors = _torch_transport(model, launch) + check_load_format(model, launch)
        return "moe_plugin", errors + _features(model, launch)
    normal = Mode.EXTEND not in capability.modes
    errors = _overlap(launch) if backend.name == "deepep" else []
    if errors:
        launch = replace(launch, single_batch_overlap=False)
    runner, unsupported = choose_experts(model, launch, normal=normal)
    if unsupported and (flags := fused_flags(model, launch)):
        plain = replace(launch, waterfill=False, fuses_experts=False)
        without = choose_experts(model, plain, normal=normal)[1]
        unsupported = unsupported if without else [_fused(flags)]
    errors += unsupported or rows_for_experts(model, launch, backend, runner)
    if runner == "moe_plugin":
        errors += check_load_format(model, launch) + _rebalances(model, launch)
    return runner, errors + _features(model, launch)


def splits_experts(model: ModelFacts, launch: LaunchFacts, capability: Capability) -> bool:
    """Whether prefill takes DeepEP's normal mode on the host's experts, and decode rows ours."""
    normal = capability.backend == "deepep" and Mode.EXTEND not in capability.modes
    return normal and launch.transport != "torch" and decodes_on_own(model, launch)


def _torch_transport(model: ModelFacts, launch: LaunchFacts) -> list[Rejection]:
    errors = []
    if launch.moe_runner_backend != "auto":
        errors.append(
            Rejection(
                "MoE runner",
                got=f"--moe-runner-backend {launch.moe_runner_backend}, torch transport",
                allowed="auto: the plugin's own experts",
                fix="--moe-runner-backend auto",
                changes=(("--moe-runner-backend", "auto"),),
                kind="unsupported",
            )
        )
    known = FORMATS.get(model.weight_format)
    own = known.own if known else None
    if own is None or own.rows != "bf16" or model.hidden_act not in own.activations:
        got = f"{model.weight_format} weights, activation {model.hidden_act}, torch transport"
        errors.append(leave(EXPERTS, got, "formats whose rows are bf16, with silu"))
    if launch.deepep_mode == "auto":
        errors.append(
            Rejection(
                "experts for prefill",
                got="--deepep-mode auto, torch transport: prefill uses normal dispatch",
                allowed="low_latency: the torch transport has no normal dispatch",
                fix="--deepep-mode low_latency",
                changes=LOW_LATENCY,
                kind="unsupported",
            )
        )
    if flags := fused_flags(model, launch):
        errors.append(_fused(flags))
    return errors


def _overlap(launch: LaunchFacts) -> list[Rejection]:
    """Single-batch overlap before Blackwell: the host passes what this DeepEP does not take."""
    compute = launch.compute_capability
    if not launch.single_batch_overlap or (compute is not None and compute >= (10, 0)):
        return []
    return [
        Rejection(
            "single-batch overlap",
            got="--enable-single-batch-overlap"
            + (f" on compute capability {dotted(compute)}" if compute else ""),
            allowed="two-batch overlap, or single-batch overlap on Blackwell with the host's own "
            "experts",
            fix="remove --enable-single-batch-overlap",
            changes=(("--enable-single-batch-overlap", None),),
            kind="unsupported",
        )
    ]


def _fused(flags: tuple[str, ...]) -> Rejection:
    typed = " and ".join(flags)
    return Rejection(
        "fused shared experts",
        got=f"{typed}: a shared expert per rank and a top-k slot more",
        allowed="routed experts only, or experts of the host's that run here",
        fix=f"remove {typed}",
        changes=tuple((flag, None) for flag in flags),
        kind="unsupported",
    )


def _rebalances(model: ModelFacts, launch: LaunchFacts) -> list[Rejection]:
    """Experts that move between ranks, in an order of the plugin's."""
    known = FORMATS[model.weight_format].own
    repacks = known is not None and known.repacks
    if not (repacks and launch.rebalances and model.classes & MOVES_BY_NAME):
        return []
    return [
        Rejection(
            "expert rebalancing",
            got=f"--enable-eplb with {model.weight_format} weights of {model.architecture}, which "
            "the plugin repacks",
            allowed="models whose list of what moves is made of the weights as they are then",
            fix="remove --enable-eplb",
            changes=(("--enable-eplb", None),),
            kind="unsupported",
        )
    ]


def _features(model: ModelFacts, launch: LaunchFacts) -> list[Rejection]:
    """Models and features of the host that do not go together with it."""
    errors = _model(model, launch)
    if launch.lora:
        errors.append(
            Rejection(
                "LoRA",
                got="adapters on the routed experts (gate_up_proj and down_proj among "
                "--lora-target-modules or the adapters' own)",
                allowed="adapters on other modules: batched experts do not apply them",
                fix=f"remove --enable-lora and --lora-paths, or {LEAVE_TEXT}",
                changes=(("--enable-lora", None), ("--lora-paths", None)),
                kind="unsupported",
            )
        )
    if launch.redundant_experts > 0 and model.classes & NO_REDUNDANT:
        errors.append(
            Rejection(
                "redundant experts",
                got=f"--ep-num-redundant-experts {launch.redundant_experts} with "
                f"{model.architecture}, whose layers in SGLang hold none",
                allowed="0",
                fix="--ep-num-redundant-experts 0",
                changes=(("--ep-num-redundant-experts", "0"),),
                kind="unsupported",
            )
        )
    return errors + _forwards(model, launch)


def _model(model: ModelFacts, launch: LaunchFacts) -> list[Rejection]:
    name, allowed = (
        model.architecture,
        "a model with a DeepEP forward (deepseek_v2, qwen3_moe, ...)",
    )
    if model.classes & REFUSED_BY_HOST and launch.a2a_backend == "deepep":
        return [leave("model", f"{name}, which SGLang refuses with DeepEP", allowed)]
    if model.classes & WRONG_SUMS and launch.tp_size > 1:
        got = f"{name}, whose MoE block in SGLang does not work on scattered tokens"
        return [leave("model", got, allowed)]
    if model.classes & (UNPROVEN | (WRONG_SUMS & PLAIN_EXPERTS)):
        got = f"{name}, whose dispatched rows T does not bound"
        return [leave("model", got, allowed, host_runs=True)]
    return []


def _forwards(model: ModelFacts, launch: LaunchFacts) -> list[Rejection]:
    """Forwards of the host whose rows no budget bounds, and buffers that two models share."""
    errors = []
    if launch.diffusion:
        got = "--dllm-algorithm, whose blocks are batched outside the chunk"
        errors.append(
            leave("rows per rank and forward", got, "autoregressive decoding", host_runs=True)
        )
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
