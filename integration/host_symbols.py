"""Every host symbol that we touch, as one checked table: what, why, and when it can go."""

from __future__ import annotations

from .host_symbol import HostSymbol
from .update_symbols import UPDATE_SYMBOLS

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
SCHEDULER_INIT = HostSymbol(
    "managers.scheduler.Scheduler.__init__",
    ("self", "server_args", "port_args"),
    "refuse arguments that were resolved without our hooks",
    "the host refuses to start when a requested plugin failed",
    runtime=True,
)
INTERNAL_STATE = HostSymbol(
    "managers.scheduler.Scheduler.get_internal_state",
    ("self", "recv_req"),
    "show plan and counters in /server_info",
    "plugins can contribute to internal state",
    runtime=True,
)
MOE_INIT = HostSymbol(
    "layers.moe.ep_moe.layer.DeepEPMoE.__init__",
    ("self", "num_experts", "top_k", "hidden_size", "intermediate_size", "layer_id"),
    "open the gate to the modern path and attach our runner",
    "upstream registers masked Triton experts for deepep_ll",
    runtime=True,
)
MOE_FORWARD = HostSymbol(
    "layers.moe.ep_moe.layer.DeepEPMoE.forward",
    ("self", "hidden_states", "topk_output"),
    "capture low-latency layers with the rest of a prefill graph",
    "upstream breaks prefill graphs at normal-mode DeepEP only",
    runtime=True,
)
SYNC_VOTES = HostSymbol(
    "managers.scheduler_components.dp_attn.MLPSyncBatchInfo.all_gather",
    ("self", "device", "group"),
    "let each attention-DP group replay its own graph",
    "upstream couples the groups only where something but low latency joins them",
    runtime=True,
    without="DP groups replay the same graphs or none, which is slower",
)
MEMORY_POOLS = HostSymbol(
    "managers.scheduler.Scheduler.init_memory_pools",
    ("self",),
    "create the transport out of what the host kept back, not out of its KV cache",
    "upstream creates the buffer between KV cache and graphs",
    runtime=True,
    without="the first dispatch creates DeepEP's buffer",
)
MODEL_FORWARD = HostSymbol(
    "model_executor.model_runner.ModelRunner.forward",
    ("self", "forward_batch"),
    "count steps, also those that replay a graph",
    "plugins are told of each step",
    runtime=True,
    without="no steps are counted",
)
METRICS = HostSymbol(
    "managers.scheduler.Scheduler.init_metrics_collector",
    ("self",),
    "offer the plugin's metrics beside the host's, with its labels",
    "plugins can contribute metrics",
    runtime=True,
    without="no metrics are offered",
)
MOE_CORE = HostSymbol(
    "layers.moe.ep_moe.layer.DeepEPMoE.run_moe_core",
    ("self", "dispatch_output"),
    "run our experts between the host's dispatch and combine",
    "upstream registers masked Triton experts for deepep_ll",
    runtime=True,
)
GET_BUFFER = HostSymbol(
    "layers.moe.token_dispatcher.deepep.DeepEPBuffer.get_deepep_buffer",
    ("group", "hidden_size", "param_bytes", "deepep_mode"),
    "create the transport from the plan instead of lazily",
    "upstream sizes the buffer from a start-up plan",
    runtime=True,
)
LL_OUTPUT = HostSymbol(
    "layers.moe.token_dispatcher.deepep.DeepEPLLDispatchOutput",
    (
        "hidden_states",
        "hidden_states_scale",
        "topk_ids",
        "topk_weights",
        "masked_m",
        "expected_m",
    ),
    "the batched layout as the host's dispatcher delivers it",
    "never: dispatcher contract",
    runtime=True,
)
LL_COMBINE = HostSymbol(
    "layers.moe.token_dispatcher.deepep.DeepEPLLCombineInput",
    ("hidden_states", "topk_ids", "topk_weights"),
    "what the host's combine takes",
    "never: dispatcher contract",
    runtime=True,
)
MEMORY_SAVER = HostSymbol(
    "utils.torch_memory_saver_adapter.TorchMemorySaverAdapter.create",
    ("enable",),
    "create the transport outside the region whose memory comes and goes with the weights",
    "the host creates its buffer before it builds the model",
    runtime=True,
)
SERVER_ARGS = HostSymbol(
    "runtime_context.get_server_args",
    (),
    "find the plan of this process",
    "never: public runtime API",
    runtime=True,
)
PARALLEL = HostSymbol(
    "runtime_context.get_parallel",
    (),
    "say which rank answers /server_info",
    "never: public runtime API",
    runtime=True,
)
RUNTIME_FLAGS = HostSymbol(
    "runtime_context.get_flags",
    (),
    "know whether something besides the all-to-all joins the DP groups",
    "upstream couples the groups only where something but low latency joins them",
    runtime=True,
)
MLP_GATHER = HostSymbol(
    "utils.common.require_mlp_tp_gather",
    (),
    "know whether something besides the all-to-all joins the DP groups",
    "upstream couples the groups only where something but low latency joins them",
    runtime=True,
)
TP_GROUP = HostSymbol(
    "distributed.parallel_state.get_tp_group",
    (),
    "have the ranks agree on their plan before a buffer is created",
    "the host compares arguments across ranks",
    runtime=True,
)
IS_EXTEND = HostSymbol(
    "layers.dp_attention.get_is_extend_in_batch",
    (),
    "know which of the two dispatch modes a batch takes",
    "the dispatcher is handed the metadata",
    runtime=True,
)
SET_IS_EXTEND = HostSymbol(
    "layers.dp_attention.set_is_extend_in_batch",
    ("is_extend_in_batch",),
    "capture low-latency layers with the rest of a prefill graph",
    "upstream breaks prefill graphs at normal-mode DeepEP only",
    runtime=True,
)
FABRIC = HostSymbol(
    "layers.moe.token_dispatcher.deepep._is_mnnvl_fabric_supported",
    (),
    "create the buffer as the host would, on machines with NVLink between nodes",
    "the host creates the buffer from a start-up plan",
    runtime=True,
)
GLOBAL_TOKENS = HostSymbol(
    "layers.dp_attention.get_dp_global_num_tokens",
    (),
    "tokens of every attention-DP group in the current forward",
    "the dispatcher is handed the metadata",
    runtime=True,
)

FUSED_FUNCTION = HostSymbol(
    "layers.moe.moe_runner.base.FusedOpPool.register_fused_func",
    ("a2a_backend_name", "runner_backend_name", "fused_func"),
    "have the host build layers of packed weights, which its Marlin runner refuses behind DeepEP",
    "the host builds a runner only where its own experts run",
    runtime=True,
    without="layers of packed weights are refused while they are built",
)
A2A_BACKEND = HostSymbol(
    "layers.moe.utils.get_moe_a2a_backend",
    (),
    "tell a draft's layers from the target's",
    "never: dispatcher contract",
    runtime=True,
)
DISPATCHERS = {
    backend: HostSymbol(
        f"layers.moe.token_dispatcher.{path}",
        ("self", "hidden_states", "topk_output"),
        "refuse more than T rows before they are sent",
        "the host refuses them itself, on every rank",
        runtime=True,
    )
    for backend, path in {
        "nixl": "nixl.NixlEPDispatcher.dispatch_a",
        "mooncake": "mooncake.MooncakeEPDispatcher.dispatch_a",
        "pplx": "pplx.PplxDispatcher.dispatch_a",
        "deepep_v2": "deepep_v2.DeepEPv2Dispatcher.dispatch",
    }.items()
}
"""By backend. Checked only where that backend is used: not every supported host has each."""

SYMBOLS: tuple[HostSymbol, ...] = (
    ADD_CLI_ARGS,
    FROM_CLI_ARGS,
    DECLARE,
    RESOLVING_VIEW,
    RESOLUTION_HOOK,
    MODEL_CONFIG,
    DRAFT_WIDTH,
    DEVICE_MEMORY,
    VIEW,
    MLA,
    GRAPH_PHASE,
    LORA_MODULES,
    DRAFT_CONFIG,
    ADAPTIVE_STEPS,
    MODEL_OVERRIDES,
    RUNNER_OVERRIDES,
    BACKEND_OVERRIDES,
    RECORD_FIELDS,
    SCHEDULER_INIT,
    INTERNAL_STATE,
    MOE_INIT,
    MOE_FORWARD,
    MOE_CORE,
    GET_BUFFER,
    LL_OUTPUT,
    LL_COMBINE,
    MEMORY_SAVER,
    MEMORY_POOLS,
    SYNC_VOTES,
    MODEL_FORWARD,
    METRICS,
    SERVER_ARGS,
    PARALLEL,
    RUNTIME_FLAGS,
    MLP_GATHER,
    TP_GROUP,
    IS_EXTEND,
    SET_IS_EXTEND,
    FABRIC,
    GLOBAL_TOKENS,
    FUSED_FUNCTION,
    *UPDATE_SYMBOLS,
    A2A_BACKEND,
)
