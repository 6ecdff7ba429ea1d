"""Our experts between the host's dispatch and its combine.

The dispatcher, two-batch overlap, EPLB statistics and graph capture stay SGLang's own. Only
``DeepEPMoE.run_moe_core`` is ours, for batched (low-latency) dispatch output under a plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...backends.deepep import DEEPEP
from ...errors import UnsupportedError, explain
from ...planning.leaving import LEAVE_TEXT
from ...planning.plan import Plan
from ...runtime.config import BatchedMoEConfig
from ...runtime.metadata import rows_to_launch_for
from ...runtime.runner import BatchedMoERunner, make_moe_runner, warm_up
from ...runtime.stats import STATS
from ..resolve.launch_facts import backend_of, deterministic, dispatch_dtype
from . import buffer, process
from .dispatchers import guard_dispatchers
from .expert_weights import expert_weights, layer_activation, loaded_format
from .marlin_stub import register_marlin_stub
from .packed_layouts import stored_codes, stored_weights
from .packed_weights import take_over_loading

_RUNNER = "_moe_plugin_runner"
_DEEP_GEMM_MESSAGE = "requires deep_gemm"


def around_moe_init(original: Callable[..., None], layer: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND hook on ``DeepEPMoE.__init__``: open the host's gate and attach our runner."""
    plan = process.current_plan()
    if plan is None:
        return original(layer, *args, **kwargs)
    buffer.prepare_host(plan)
    if plan.runner == "moe_plugin":
        _attach_runner(original, layer, plan, args, kwargs)
    else:
        original(layer, *args, **kwargs)
        if plan.own_decode:
            _attach_for_decode(layer, plan)
    backend = _backend()
    if backend != "deepep":
        guard_dispatchers(layer.dispatcher, plan, backend)
    buffer.announce(layer.dispatcher)
    return None


def _backend() -> str:
    """The all-to-all of the model that is being built; a draft's may be another."""
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    return str(get_moe_a2a_backend().value)


def _attach_runner(
    original: Callable[..., None], layer: Any, plan: Plan, args: Any, kwargs: Any
) -> None:
    register_marlin_stub(_backend())
    try:
        original(layer, *args, **kwargs)
    except AssertionError as error:
        # The constructor's last statement insists on DeepGEMM for quantised experts; ours do
        # not need it, and everything before it is done.
        if _DEEP_GEMM_MESSAGE not in str(error):
            raise
    # The host's modern path: dispatch, run_moe_core, combine; without its deprecated branches.
    layer.deprecate_flag = True
    runner = _make_runner(layer, plan)
    setattr(layer, _RUNNER, runner)
    fmt = loaded_format(layer)
    if fmt.packed:
        take_over_loading(layer)
    if stored_weights(layer, "w13").is_cuda:
        warm_up(runner.config, fmt, layer_activation(layer))
    if not fmt.fp8_rows:
        # Unset, the host would quantise activations to FP8 for bf16 weights as well, such as those
        # of a layer that an FP8 checkpoint leaves out.
        layer.dispatcher.set_quant_config({"dispatcher_output_dtype": "bf16"})
        _check_rows_in_bf16(layer, fmt.name)


def _attach_for_decode(layer: Any, plan: Plan) -> None:
    """Mode auto: the host's experts keep normal dispatch and all that belongs to it; ours compute
    what low latency brings. A draft may have other weights than the plan's model: the host keeps
    those that ours would repack, and those whose rows come in another dtype than ours take."""
    if stored_codes(layer, "w13") is not None:
        return
    fmt = loaded_format(layer)
    if fmt.fp8_rows != plan.fp8_rows:
        return
    runner = _make_runner(layer, plan)
    setattr(layer, _RUNNER, runner)
    if stored_weights(layer, "w13").is_cuda:
        warm_up(runner.config, fmt, layer_activation(layer))


def _check_rows_in_bf16(layer: Any, weights: str) -> None:
    """The user's flag wins over the layer's wish; most layers may be FP8, so no plan refuses it."""
    backend = _backend()
    asked, source = dispatch_dtype(process.host_config(), backend)
    each_layer = backend_of(backend).bf16_variable == ""
    if asked == "bf16" or (each_layer and asked == "auto"):
        return
    raise UnsupportedError(
        explain(
            f"MoE layer {layer.layer_id}: dtype of dispatched rows",
            got=f"{asked} ({source}) with {weights} weights"
            if each_layer
            else f"FP8 for every layer over {backend}, with {weights} weights",
            allowed="bf16, which auto selects for each layer over DeepEP",
            fix=f"remove {source}" if each_layer else DEEPEP.explicit_flag,
        )
    )


def around_moe_forward(
    original: Callable[..., Any], layer: Any, hidden_states: Any, topk_output: Any
) -> Any:
    """AROUND hook on ``DeepEPMoE.forward``: our layers are captured in the host's prefill graphs.

    The host breaks these graphs at every MoE layer, because DeepEP's normal mode cannot be
    captured. Low latency can, as its decode graphs show, and then a prefill step that replays a
    graph waits for Python at no layer.
    """
    plan = process.current_plan()
    if plan is None or not plan.captures_moe_in_prefills or not _in_prefill_graph():
        return original(layer, hidden_states, topk_output)
    from sglang.srt.layers.dp_attention import get_is_extend_in_batch, set_is_extend_in_batch

    before = get_is_extend_in_batch()  # the host says no while it captures
    set_is_extend_in_batch(True)
    try:
        return layer.forward_impl(hidden_states, topk_output)
    finally:
        set_is_extend_in_batch(before)


def _in_prefill_graph() -> bool:
    """Whether the host captures a prefill graph: in pieces, or as a whole, where it is asked to."""
    try:
        from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph import (
            is_in_breakable_cuda_graph,
        )
    except ImportError:  # hosts without such graphs
        return False
    try:
        from sglang.srt.model_executor.runner_utils.prefill_graph import is_in_full_prefill_graph
    except ImportError:
        return bool(is_in_breakable_cuda_graph())
    return bool(is_in_breakable_cuda_graph() or is_in_full_prefill_graph())


def around_run_moe_core(original: Callable[..., Any], layer: Any, dispatch_output: Any) -> Any:
    """AROUND hook on ``DeepEPMoE.run_moe_core``: batched output goes to our experts."""
    runner: BatchedMoERunner | None = getattr(layer, _RUNNER, None)
    if runner is None or not dispatch_output.format.is_deepep_ll():
        return original(layer, dispatch_output)
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLCombineInput

    cfg, own_tokens = runner.config, dispatch_output.topk_ids.shape[0]
    expected_m, beside_m = rows_to_launch_for(process.current_metadata(), own_tokens, cfg)
    weights = expert_weights(layer)
    if weights.w13.is_cuda:  # some models give the layer its limit after it was made
        warm_up(runner.config, weights.format, weights.activation)
    rows, scales = dispatch_output.hidden_states, dispatch_output.hidden_states_scale
    measures = STATS.workspace_device_bytes is None and rows.is_cuda
    before = _allocated_bytes() if measures else 0
    masked_m = dispatch_output.masked_m
    output = runner.run_experts(rows, scales, masked_m, weights, expected_m, beside_m)
    if measures:
        received = rows.nbytes + (0 if scales is None else scales.nbytes)
        STATS.record_device_bytes("workspace", received + _allocated_bytes() - before)
    STATS.count_layer(layer.layer_id)
    return DeepEPLLCombineInput(output, dispatch_output.topk_ids, dispatch_output.topk_weights)


def _allocated_bytes() -> int:
    """All that torch has ever allocated on this GPU. Its allocator knows, without the GPU, and
    while a graph is captured."""
    import torch

    return int(torch.cuda.memory_stats()["allocated_bytes.all.allocated"])


def _make_runner(layer: Any, plan: Plan) -> BatchedMoERunner:
    moe = layer.moe_runner_config
    for name, allowed in (("apply_router_weight_on_input", False), ("is_gated", True)):
        if getattr(moe, name, allowed) != allowed:
            raise UnsupportedError(
                explain(
                    f"MoE layer {layer.layer_id}: {name}",
                    got=not allowed,
                    allowed=allowed,
                    fix=LEAVE_TEXT,
                )
            )
    layer_activation(layer)  # refuses what ours would leave out
    if getattr(layer, "w13_weight_bias", None) is not None:
        raise UnsupportedError(
            explain(
                f"MoE layer {layer.layer_id}: biases",
                got="experts with biases",
                allowed="experts without: ours are not handed any",
                fix=LEAVE_TEXT,
            )
        )
    config = BatchedMoEConfig(
        num_experts=layer.num_experts,
        num_ranks=layer.moe_ep_size,
        top_k=layer.top_k,
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size_per_partition,
        max_num_tokens=plan.max_dispatch_tokens_per_rank,
        batch_invariant=deterministic(process.host_config()),
        other_ranks=layer.moe_ep_size - plan.attn_tp_size if plan.prefills_beside_decode else 0,
    )
    return make_moe_runner(config, process.device_type())
