"""Every host symbol that we touch, as one checked table: what, why, and when it can go."""

from __future__ import annotations

import inspect
import pkgutil
from dataclasses import dataclass
from importlib.metadata import version

from packaging.specifiers import SpecifierSet

SUPPORTED_HOST = SpecifierSet(">=0.5.20,<0.6", prereleases=True)
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
    """

    path: str
    parameters: tuple[str, ...]
    why: str
    delete_when: str
    runtime: bool = False

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
MODEL_OVERRIDES = HostSymbol(
    "arg_groups.overrides.collect_model_override_declarations",
    ("architecture", "server_args", "hf_config"),
    "know early what a model's own rules make of all-to-all, runner and topology",
    "the host decides about the all-to-all before budgets and memory",
)
RUNNER_OVERRIDES = HostSymbol(
    "arg_groups.overrides._moe_runner_backend_quant_constraints",
    ("view",),
    "know early what the quantization makes of the runner",
    "the host decides about the all-to-all before budgets and memory",
)
BACKEND_OVERRIDES = HostSymbol(
    "arg_groups.overrides._a2a_backend_overrides",
    ("view",),
    "know early that waterfill selects deepep",
    "the host decides about the all-to-all before budgets and memory",
)
"""These three are checked only where they are used: optional."""
RECORD_FIELDS = HostSymbol(
    "arg_groups.arg_utils.record_fields",
    ("cls",),
    "resolve a refused launch again with its own fixes",
    "never: how records are read",
)
"""Checked only where it is used: without it a refusal's fixes are planned, but not resolved."""
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
)
"""Checked only where it is used: optional."""
MEMORY_POOLS = HostSymbol(
    "managers.scheduler.Scheduler.init_memory_pools",
    ("self",),
    "create the transport out of what the host kept back, not out of its KV cache",
    "upstream creates the buffer between KV cache and graphs",
    runtime=True,
)
"""Checked only where it is used: without it the first dispatch creates the transport."""
MODEL_FORWARD = HostSymbol(
    "model_executor.model_runner.ModelRunner.forward",
    ("self", "forward_batch"),
    "count steps, also those that replay a graph",
    "plugins are told of each step",
    runtime=True,
)
METRICS = HostSymbol(
    "managers.scheduler.Scheduler.init_metrics_collector",
    ("self",),
    "offer the plugin's metrics beside the host's, with its labels",
    "plugins can contribute metrics",
    runtime=True,
)
"""These two are checked only where they are used: optional."""
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
)
"""Checked only where a layer's weights may be packed."""
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
    SCHEDULER_INIT,
    INTERNAL_STATE,
    MOE_INIT,
    MOE_FORWARD,
    MOE_CORE,
    GET_BUFFER,
    LL_OUTPUT,
    LL_COMBINE,
    MEMORY_SAVER,
    GLOBAL_TOKENS,
    A2A_BACKEND,
)

OPTIONAL: tuple[HostSymbol, ...] = (
    MODEL_OVERRIDES,
    RUNNER_OVERRIDES,
    BACKEND_OVERRIDES,
    SYNC_VOTES,
    MEMORY_POOLS,
    MODEL_FORWARD,
    METRICS,
    RECORD_FIELDS,
    FUSED_FUNCTION,
)
"""Without one of these the plugin does less; what bounds a batch does not depend on them."""


def host_version() -> str:
    """Version of the installed SGLang distribution."""
    return version("sglang")


def check_version() -> str | None:
    """Why this host version is not supported, or None."""
    found = host_version()
    if found in SUPPORTED_HOST:
        return None
    return f"sglang {found} is outside the supported range {SUPPORTED_HOST}"


def check_symbol(symbol: HostSymbol) -> str | None:
    """Why ``symbol`` cannot be used on this host, or None. Imports its module."""
    try:
        found = pkgutil.resolve_name(symbol.target)
    except (ImportError, AttributeError) as error:
        return f"{symbol.target} is missing ({error}); needed to {symbol.why}"
    # Another plugin may have wrapped it: what counts is the host's own signature underneath.
    names = list(inspect.signature(inspect.unwrap(found)).parameters)
    positions = [names.index(name) if name in names else -1 for name in symbol.parameters]
    if -1 in positions or positions != sorted(positions):
        return (
            f"{symbol.target} takes {names}, expected {list(symbol.parameters)} in this order; "
            f"needed to {symbol.why}"
        )
    return None


def problems(*, runtime: bool) -> list[str]:
    """Everything about this host that we cannot work with; empty when all is well.

    Args:
        runtime: also check what scheduler processes need (imports model code).
    """
    wrong_version = check_version()
    if wrong_version:
        return [wrong_version]
    wanted = [symbol for symbol in SYMBOLS if runtime or not symbol.runtime]
    return [text for symbol in wanted if (text := check_symbol(symbol))]
