"""Host symbols that resolution touches, each with what for, and when it can go.

Those of scheduler processes stand in `scheduler_symbols.py`, and the table of all at its end.
"""

from __future__ import annotations

from dataclasses import dataclass

_SRT = "sglang.srt."


@dataclass(frozen=True, slots=True)
class HostSymbol:
    """One symbol of the host that we call or hook.

    Attributes:
        path: dotted path below ``sglang.srt.``.
        parameters: names that must be among its parameters, in this order.
        why: what we need it for.
        delete_when: what upstream change makes the entry unnecessary.
        runtime: only needed in scheduler processes (importing it is expensive elsewhere).
        without: what the plugin does where this is missing; empty where it cannot act at all. What
            bounds a batch never depends on a symbol that may be missing.
    """

    path: str
    parameters: tuple[str, ...]
    why: str
    delete_when: str
    runtime: bool = False
    without: str = ""

    @property
    def target(self) -> str:
        """Full dotted path, as ``HookRegistry`` takes it."""
        return _SRT + self.path


ADD_CLI_ARGS = HostSymbol(
    "server_args.ServerArgs.add_cli_args",
    ("parser",),
    "add our flags to the host's parser",
    "plugins can register flags",
)
FROM_CLI_ARGS = HostSymbol(
    "server_args.ServerArgs.from_cli_args",
    ("args",),
    "carry our flags' values, which are not ServerArgs fields, to resolution",
    "plugins can register flags",
)
DECLARE = HostSymbol(
    "arg_groups.overrides.declare_resolution",
    ("server_args", "source", "fields"),
    "write a default that the user left unset",
    "never: public resolution API",
)
RESOLVING_VIEW = HostSymbol(
    "arg_groups.model_override_base.resolving_view",
    ("server_args",),
    "read what resolution decided so far",
    "never: public resolution API",
)
RESOLUTION_HOOK = HostSymbol(
    "arg_groups.resolution_hooks.register_resolution_hook",
    ("name",),
    "fill budgets before CUDA-graph parsing, validate after the last step",
    "never: public plugin API",
)
MODEL_CONFIG = HostSymbol(
    "arg_groups.overrides.model_config_of",
    ("server_args",),
    "read the model's config.json as the host understands it",
    "never: public resolution API",
)
DRAFT_WIDTH = HostSymbol(
    "arg_groups.overrides.max_speculative_num_draft_tokens",
    ("server_args",),
    "rows per request of a verify batch",
    "the host checks its own DeepEP v1 budget",
)
DEVICE_MEMORY = HostSymbol(
    "utils.common.get_device_memory_capacity",
    ("device",),
    "swap the host's flat DeepEP reserve for the planned bytes",
    "the host reserves from a start-up plan",
)
VISION_FACTOR = HostSymbol(
    "arg_groups.memory_hook.adjust_mem_fraction_for_vlm",
    ("mem_fraction_static", "model_config", "post_capture_kv_sizing", "gpu_mem"),
    "know early what the host keeps for the towers of a multimodal model",
    "the host reserves from a start-up plan",
    without="what the host keeps for towers is seen, and refused where it leaves nothing, once "
    "memory is sized",
)
HYBRID = HostSymbol(
    "configs.hybrid_arch.mambaish_config",
    ("model_config",),
    "know whether a request has states of linear attention, and how large they are",
    "the host reserves from a start-up plan",
)
PARALLEL = HostSymbol(
    "runtime_context.get_parallel",
    (),
    "know how such states are divided over ranks",
    "the host reserves from a start-up plan",
)
VIEW = HostSymbol(
    "arg_groups.model_override_base.resolved_view",
    ("server_args",),
    "read what resolution decided",
    "never: public resolution API",
)
MLA = HostSymbol(
    "arg_groups.model_override_base.use_mla_backend",
    ("server_args",),
    "know how large a token of the KV cache is",
    "the host reserves from a start-up plan",
)
GRAPH_PHASE = HostSymbol(
    "model_executor.cuda_graph_config.with_phase",
    ("config", "phase"),
    "lower captured batches that the host filled after us",
    "the host bounds its batches by the buffer",
)
LORA_MODULES = HostSymbol(
    "lora.utils.get_normalized_target_modules",
    (),
    "know whether adapters change the experts",
    "the host refuses them behind a batched layout",
    without="launches with LoRA adapters are left alone",
)
DRAFT_CONFIG = HostSymbol(
    "utils.hf_transformers_utils.get_config",
    ("model",),
    "read a separate draft model's config.json",
    "the host checks its own DeepEP v1 budget",
    without="launches with a separate draft model are left alone",
)
DRAFT_MODEL = HostSymbol(
    "configs.model_config.ModelConfig.from_server_args",
    ("server_args", "model_path", "model_revision", "is_draft_model"),
    "know which layers of another checkpoint are loaded as the draft, and their quantization",
    "the host counts weights before it loads them",
    without="a draft from another checkpoint is counted whole on every rank",
)
ADAPTIVE_STEPS = HostSymbol(
    "speculative.adaptive_spec_params.resolve_candidate_steps_from_config",
    ("cfg_path",),
    "rows per request of the widest step that adaptive speculation may choose",
    "the host checks its own DeepEP v1 budget",
    without="launches with adaptive speculation are left alone",
)
MODEL_OVERRIDES = HostSymbol(
    "arg_groups.overrides.collect_model_override_declarations",
    ("architecture", "server_args", "hf_config"),
    "know early what a model's own rules make of all-to-all, runner and topology",
    "the host decides about the all-to-all before budgets and memory",
    without="what the host decides late is seen, and refused, at the end of resolution",
)
RUNNER_OVERRIDES = HostSymbol(
    "arg_groups.overrides._moe_runner_backend_quant_constraints",
    ("view",),
    "know early what the quantization makes of the runner",
    "the host decides about the all-to-all before budgets and memory",
    without="what the host decides late is seen, and refused, at the end of resolution",
)
BACKEND_OVERRIDES = HostSymbol(
    "arg_groups.overrides._a2a_backend_overrides",
    ("view",),
    "know early that waterfill selects deepep",
    "the host decides about the all-to-all before budgets and memory",
    without="what the host decides late is seen, and refused, at the end of resolution",
)
RECORD_FIELDS = HostSymbol(
    "arg_groups.arg_utils.record_fields",
    ("cls",),
    "resolve a refused launch again with its own fixes",
    "never: how records are read",
    without="a refusal's fixes are planned, but not resolved",
)
