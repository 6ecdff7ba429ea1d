"""Mode auto: who computes what a layer's dispatcher brings, under a plan that splits experts."""

from types import SimpleNamespace

import torch
from program_io import emit

from moe_plugin.batched_backend import Capability
from moe_plugin.integration.serve import buffer, moe_layer, process
from moe_plugin.planning.plan import Plan

TOKENS, EXPERTS, HIDDEN, INTER = 8, 4, 64, 32


def bf16_weights(layer):
    """As the plan knows the model's."""
    layer.w13_weight = torch.randn(EXPERTS, 2 * INTER, HIDDEN)
    layer.w2_weight = torch.randn(EXPERTS, HIDDEN, INTER)


def fp8_weights(layer):
    """Of a draft, whose rows come in another dtype than the plan's."""
    layer.w13_weight = torch.empty(EXPERTS, 2 * INTER, HIDDEN, dtype=torch.float8_e4m3fn)
    layer.w13_weight_scale = torch.ones(EXPERTS)


def packed_weights(layer):
    """Packed ones, which the host keeps in its own order."""
    layer.w13_weight_packed = torch.zeros(EXPERTS, HIDDEN // 8, 2 * INTER, dtype=torch.int32)
    layer.w13_weight_scale = torch.ones(EXPERTS, HIDDEN // 32, 2 * INTER)
    layer.quant_method = SimpleNamespace(quant_config=SimpleNamespace(weight_bits=4))


def original_init(layer):
    """The host's own constructor, as far as we read what it leaves."""
    layer.layer_id, layer.num_experts, layer.moe_ep_size, layer.top_k = 3, EXPERTS, 1, 2
    layer.hidden_size, layer.intermediate_size_per_partition = HIDDEN, INTER
    layer.moe_runner_config = SimpleNamespace(
        activation="silu", is_gated=True, apply_router_weight_on_input=False
    )
    layer.weights(layer)
    layer.dispatcher = SimpleNamespace(set_quant_config=lambda _config: layer.calls.append("rows"))


def output(low_latency):
    """What a dispatcher brings, of either mode."""
    return SimpleNamespace(
        format=SimpleNamespace(is_deepep_ll=lambda: low_latency),
        hidden_states=torch.randn(EXPERTS, TOKENS, HIDDEN),
        hidden_states_scale=None,
        masked_m=torch.full((EXPERTS,), 2, dtype=torch.int32),
        topk_ids=torch.zeros(4, 2, dtype=torch.int64),
        topk_weights=torch.ones(4, 2),
    )


def computed(own_decode, weights=bf16_weights):
    """The host's experts or ours, for normal and for low-latency rows."""
    layer = SimpleNamespace(calls=[], deprecate_flag="the host's", weights=weights)
    plan = Plan(
        capability=Capability(True, ""),
        runner="host",
        own_decode=own_decode,
        groups_apart=False,
        transport="deepep",
        max_dispatch_tokens_per_rank=TOKENS,
    )
    process.current_plan = lambda: plan
    process.current_metadata = lambda: None
    buffer.announce = lambda _dispatcher: None
    process.host_config = lambda: SimpleNamespace(
        device="cpu", enable_deterministic_inference=False
    )
    moe_layer._backend = lambda: "deepep"
    moe_layer.around_moe_init(original_init, layer)
    found = []
    for low_latency in (False, True):
        result = moe_layer.around_run_moe_core(
            lambda *_args: "the host's", layer, output(low_latency)
        )
        found.append(result if isinstance(result, str) else "ours")
    return [*found, layer.deprecate_flag, layer.calls]


emit(
    [
        computed(True),
        computed(False),
        computed(True, fp8_weights),
        computed(True, packed_weights),
    ]
)
