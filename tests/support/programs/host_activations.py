"""How far our activation is from the host's own functions, for each kind of configuration."""

from types import SimpleNamespace

import torch
from program_io import emit
from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

from moe_plugin.integration.serve.expert_weights import layer_activation
from moe_plugin.kernels.experts_torch import activate_torch

torch._dynamo.config.disable = True  # the host's functions as they are written
ALPHA, LIMIT = 1.702, 2.0
both = 4 * torch.randn(64, 96)
gate, up = both.chunk(2, -1)


def differs(theirs, **config):
    """Largest difference."""
    layer = SimpleNamespace(layer_id=0, moe_runner_config=MoeRunnerConfig(**config))
    return float((activate_torch(both, layer_activation(layer)) - theirs).abs().max())


silu = torch.nn.functional.silu
scaled = {"gemm1_alpha": ALPHA, "gemm1_clamp_limit": LIMIT}
apart = fused_moe.swiglu_no_interleaved_with_alpha_and_limit(both, ALPHA, LIMIT)
emit(
    {
        "plain": differs(silu(gate) * up),
        "limited": differs(
            silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT), swiglu_limit=LIMIT
        ),
        "clamped": differs(fused_moe._swiglu_silu_clamp_mul(both, LIMIT), gemm1_clamp_limit=LIMIT),
        "interleaved": differs(
            fused_moe.swiglu_gpt_oss_sigmoid_alpha(both, ALPHA, LIMIT), **scaled
        ),
        "scaled": differs(apart, gate_up_interleaved=False, gemm1_beta=1.0, **scaled),
    }
)
