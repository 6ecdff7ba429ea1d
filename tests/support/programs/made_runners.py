"""Runners that are made for layers of several configurations, or why none is made."""

from types import SimpleNamespace

from program_io import emit

from moe_plugin.batched_backend import Capability
from moe_plugin.integration.serve import moe_layer, process
from moe_plugin.planning.plan import Plan

PLAN = Plan(capability=Capability(True, ""), max_dispatch_tokens_per_rank=128)


def made(deterministic=False, **limits):
    """What is special about the runner of a layer, or the refusal."""
    moe = SimpleNamespace(
        activation="silu", is_gated=True, apply_router_weight_on_input=False, **limits
    )
    layer = SimpleNamespace(
        layer_id=3,
        moe_runner_config=moe,
        num_experts=16,
        moe_ep_size=2,
        top_k=2,
        hidden_size=64,
        intermediate_size_per_partition=32,
    )
    process.host_config = lambda: SimpleNamespace(
        device="cpu", enable_deterministic_inference=deterministic
    )
    try:
        runner = moe_layer._make_runner(layer, PLAN)
    except Exception as error:
        return f"{type(error).__name__} {error}"
    config = runner.config
    return {
        "type": type(runner).__name__,
        "local_experts": config.num_local_experts,
        "batch_invariant": config.batch_invariant,
    }


emit(
    {
        "limited": made(swiglu_limit=10.0),
        "clamped": made(gemm1_clamp_limit=7.0),
        "scaled, unlimited": made(gemm1_alpha=1.7),
        "clamped and limited": made(gemm1_clamp_limit=7.0, swiglu_limit=7.0),
        "two added to up": made(gemm1_alpha=1.7, gemm1_clamp_limit=7.0, gemm1_beta=2.0),
        "no limits": made(swiglu_limit=None, gemm1_clamp_limit=0),
        "deterministic": made(deterministic=True),
    }
)
