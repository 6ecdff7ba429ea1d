"""Host symbols that scheduler processes touch, which are expensive to import elsewhere."""

from __future__ import annotations

from functools import partial

from . import host_symbols
from .host_symbols import HostSymbol

_symbol = partial(HostSymbol, runtime=True)

SCHEDULER_INIT = _symbol(
    "managers.scheduler.Scheduler.__init__",
    ("self", "server_args", "port_args"),
    "refuse arguments that were resolved without our hooks",
    "the host refuses to start when a requested plugin failed",
)
INTERNAL_STATE = _symbol(
    "managers.scheduler.Scheduler.get_internal_state",
    ("self", "recv_req"),
    "show plan and counters in /server_info",
    "plugins can contribute to internal state",
)
MOE_INIT = _symbol(
    "layers.moe.ep_moe.layer.DeepEPMoE.__init__",
    ("self", "num_experts", "top_k", "hidden_size", "intermediate_size", "layer_id"),
    "open the gate to the modern path and attach our runner",
    "upstream registers masked Triton experts for deepep_ll",
)
MOE_FORWARD = _symbol(
    "layers.moe.ep_moe.layer.DeepEPMoE.forward",
    ("self", "hidden_states", "topk_output"),
    "capture low-latency layers with the rest of a prefill graph",
    "upstream breaks prefill graphs at normal-mode DeepEP only",
)
SYNC_VOTES = _symbol(
    "managers.scheduler_components.dp_attn.MLPSyncBatchInfo.all_gather",
    ("self", "device", "group"),
    "let each attention-DP group replay its own graph",
    "upstream couples the groups only where something but low latency joins them",
    without="DP groups replay the same graphs or none, which is slower",
)
MEMORY_POOLS = _symbol(
    "managers.scheduler.Scheduler.init_memory_pools",
    ("self",),
    "create the transport out of what the host kept back, not out of its KV cache",
    "upstream creates the buffer between KV cache and graphs",
    without="the first dispatch creates DeepEP's buffer",
)
MODEL_FORWARD = _symbol(
    "model_executor.model_runner.ModelRunner.forward",
    ("self", "forward_batch"),
    "count steps, also those that replay a graph",
    "plugins are told of each step",
    without="no steps are counted",
)
STEP_BATCH = _symbol(
    "model_executor.forward_batch_info.ForwardBatch",
    ("forward_mode", "global_num_token_non_padded_cpu"),
    "know mode and rows of a step",
    "plugins are told of each step",
    without="no steps are counted",
)
STEP_OUTPUT = _symbol(
    "model_executor.model_runner.ModelRunnerOutput",
    ("can_run_graph",),
    "know whether a step replayed a graph",
    "plugins are told of each step",
    without="no steps are counted",
)
METRICS = _symbol(
    "managers.scheduler.Scheduler.init_metrics_collector",
    ("self",),
    "offer the plugin's metrics beside the host's, with its labels",
    "plugins can contribute metrics",
    without="no metrics are offered",
)
MOE_CORE = _symbol(
    "layers.moe.ep_moe.layer.DeepEPMoE.run_moe_core",
    ("self", "dispatch_output"),
    "run our experts between the host's dispatch and combine",
    "upstream registers masked Triton experts for deepep_ll",
)
GET_BUFFER = _symbol(
    "layers.moe.token_dispatcher.deepep.DeepEPBuffer.get_deepep_buffer",
    ("group", "hidden_size", "param_bytes", "deepep_mode"),
    "create the transport from the plan instead of lazily",
    "upstream sizes the buffer from a start-up plan",
)
LL_OUTPUT = _symbol(
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
)
LL_COMBINE = _symbol(
    "layers.moe.token_dispatcher.deepep.DeepEPLLCombineInput",
    ("hidden_states", "topk_ids", "topk_weights"),
    "what the host's combine takes",
    "never: dispatcher contract",
)
SERVER_ARGS = _symbol(
    "runtime_context.get_server_args",
    (),
    "find the plan of this process",
    "never: public runtime API",
)
PARALLEL = _symbol(
    "runtime_context.get_parallel",
    (),
    "say which rank answers /server_info",
    "never: public runtime API",
    without="/server_info shows nothing of the plugin",
)
RUNTIME_FLAGS = _symbol(
    "runtime_context.get_flags",
    (),
    "know whether something besides the all-to-all joins the DP groups",
    "upstream couples the groups only where something but low latency joins them",
    without="DP groups replay the same graphs or none, which is slower",
)
MLP_GATHER = _symbol(
    "utils.common.require_mlp_tp_gather",
    (),
    "know whether something besides the all-to-all joins the DP groups",
    "upstream couples the groups only where something but low latency joins them",
    without="DP groups replay the same graphs or none, which is slower",
)
TP_GROUP = _symbol(
    "distributed.parallel_state.get_tp_group",
    (),
    "have the ranks agree on their plan before a buffer is created",
    "the host compares arguments across ranks",
)
IS_EXTEND = _symbol(
    "layers.dp_attention.get_is_extend_in_batch",
    (),
    "know which of the two dispatch modes a batch takes",
    "the dispatcher is handed the metadata",
)
SET_IS_EXTEND = _symbol(
    "layers.dp_attention.set_is_extend_in_batch",
    ("is_extend_in_batch",),
    "capture low-latency layers with the rest of a prefill graph",
    "upstream breaks prefill graphs at normal-mode DeepEP only",
)
FABRIC = _symbol(
    "layers.moe.token_dispatcher.deepep._is_mnnvl_fabric_supported",
    (),
    "create the buffer as the host would, on machines with NVLink between nodes",
    "the host creates the buffer from a start-up plan",
)
GLOBAL_TOKENS = _symbol(
    "layers.dp_attention.get_dp_global_num_tokens",
    (),
    "tokens of every attention-DP group in the current forward",
    "the dispatcher is handed the metadata",
)
FUSED_FUNCTION = _symbol(
    "layers.moe.moe_runner.base.FusedOpPool.register_fused_func",
    ("a2a_backend_name", "runner_backend_name", "fused_func"),
    "have the host build layers of packed weights, which its Marlin runner refuses behind DeepEP",
    "the host builds a runner only where its own experts run",
    without="layers of packed weights are refused while they are built",
)
_HALF_WRITTEN = "a weight update that restores no 4-bit experts may leave a half-written model"
_RESTORES = "the host restores weights before every update of any kind"
LOAD_WEIGHTS = _symbol(
    "model_loader.loader.DefaultModelLoader.load_weights_only",
    ("model", "weights", "target_device"),
    "give the host back 4-bit weights that were repacked, before an update from disk loads",
    _RESTORES,
    without=_HALF_WRITTEN,
)
TENSOR_UPDATE = _symbol(
    "model_executor.model_runner_components.weight_updater.WeightUpdater"
    ".update_weights_from_tensor",
    ("self", "named_tensors", "load_format"),
    "refuse updates of repacked 4-bit weights outside a session",
    _RESTORES,
    without=_HALF_WRITTEN,
)
IPC_UPDATE = _symbol(
    "model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_ipc",
    ("self", "recv_req"),
    "refuse updates of repacked 4-bit weights outside a session",
    _RESTORES,
    without=_HALF_WRITTEN,
)
DISTRIBUTED_UPDATE = _symbol(
    "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    ".update_weights_from_distributed",
    ("self", "recv_req"),
    "refuse updates of repacked 4-bit weights outside a session",
    _RESTORES,
    without=_HALF_WRITTEN,
)
DISTRIBUTED_ANSWER = _symbol(
    "managers.io_struct.UpdateWeightsFromDistributedReqOutput",
    (),
    "answer an update that is refused",
    _RESTORES,
    without=_HALF_WRITTEN,
)
A2A_BACKEND = _symbol(
    "layers.moe.utils.get_moe_a2a_backend",
    (),
    "tell a draft's layers from the target's",
    "never: dispatcher contract",
)
DISPATCHERS = {
    backend: _symbol(
        f"layers.moe.token_dispatcher.{path}",
        ("self", "hidden_states", "topk_output"),
        "refuse more than T rows before they are sent",
        "the host refuses them itself, on every rank",
    )
    for backend, path in {
        "nixl": "nixl.NixlEPDispatcher.dispatch_a",
        "mooncake": "mooncake.MooncakeEPDispatcher.dispatch_a",
        "pplx": "pplx.PplxDispatcher.dispatch_a",
        "deepep_v2": "deepep_v2.DeepEPv2Dispatcher.dispatch",
    }.items()
}
"""By backend. Checked only where that backend is used: not every supported host has each."""

SYMBOLS = tuple(
    symbol
    for symbol in {**vars(host_symbols), **globals()}.values()
    if isinstance(symbol, HostSymbol)
)
"""Every symbol of the host that we touch, but the dispatchers."""
