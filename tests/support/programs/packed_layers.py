"""Packed layers as the host's own methods make them, repacked: the format, or why there is none.

Methods are made without their constructors, which ask for a GPU; what they create is the host's.
"""

from types import SimpleNamespace

import torch
from program_io import emit
from sglang.srt.layers.quantization.awq.awq import AWQMoEMethod
from sglang.srt.layers.quantization.awq.schemes.awq_moe import AWQMoEScheme
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsFusedMoEMethod,
)
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsWNA16MoE
from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
from sglang.srt.layers.quantization.gptq.gptq import GPTQMarlinMoEMethod
from sglang.srt.layers.quantization.gptq.schemes.gptq_moe import GPTQMarlinMoEScheme
from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Method
from sglang.srt.model_loader.loader import DefaultModelLoader
from sglang.srt.model_loader.weight_utils import initialize_dummy_weights

from moe_plugin.integration.serve.expert_weights import expert_weights
from moe_plugin.integration.serve.packed_weights import take_over_loading
from moe_plugin.kernels.experts_torch import dequantise_expert_torch

EXPERTS, HIDDEN, INTER = 2, 256, 128


def bare(kind, **attributes):
    """An object of a class, with these attributes."""
    made = object.__new__(kind)
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


def layer(method, scheme=None):
    """What the method creates, filled as for ``--load-format dummy``, repacked, restored as for a
    reload, and repacked as it is."""
    made = torch.nn.Module()
    made.layer_id, made.moe_tp_size, made.scheme = 0, 1, scheme
    made.hidden_size, made.intermediate_size_per_partition = HIDDEN, INTER
    made.moe_runner_config = SimpleNamespace(activation="silu", is_gated=True)
    made.quant_method = method
    method.create_weights(
        made, num_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size_per_partition=INTER,
        params_dtype=torch.bfloat16, weight_loader=None,
    )  # fmt: skip
    initialize_dummy_weights(made)
    created = {name: [p.shape, p.dtype] for name, p in made.named_parameters()}
    take_over_loading(made)
    method.process_weights_after_loading(made)
    weights = expert_weights(made)
    stand_for = dequantise_expert_torch(weights, 1)
    before = [tensor.clone() for tensor in packed(weights)]
    DefaultModelLoader.restore_weights_before_loading(made, torch.device("cpu"))
    restored = dict(made.named_parameters())
    differ = [
        name for name, was in created.items() if [restored[name].shape, restored[name].dtype] != was
    ]
    method.process_weights_after_loading(made)
    return {
        "format": weights.format.name,
        "shapes": [list(each.shape) for each in stand_for],
        "finite": all(bool(each.isfinite().all()) for each in stand_for),
        "not restored": differ,
        "same": all(map(torch.equal, packed(expert_weights(made)), before)),
    }


def packed(weights):
    """Codes and scales of both projections."""
    return weights.w13, weights.w13_scale, weights.w2, weights.w2_scale


def compressed_tensors():
    scheme = bare(
        CompressedTensorsWNA16MoE, num_bits=4, packed_factor=8, strategy="group",
        group_size=32, actorder=None, sym=True, load_up_proj_weight_first=False,
    )  # fmt: skip
    return layer(bare(CompressedTensorsFusedMoEMethod), scheme)


config = SimpleNamespace(
    weight_bits=4, pack_factor=8, group_size=128, desc_act=False, bit8_pack_factor=2, has_zp=True,
    linear_quant_method="awq",
)  # fmt: skip
fp8 = SimpleNamespace(
    weight_block_size=[128, 128], activation_scheme="dynamic", is_checkpoint_fp8_serialized=True
)
emit(
    {
        "compressed-tensors": compressed_tensors(),
        "AWQ": layer(
            bare(AWQMoEMethod, quant_config=config), bare(AWQMoEScheme, quant_config=config)
        ),
        "GPTQ": layer(
            bare(GPTQMarlinMoEMethod, quant_config=config),
            bare(GPTQMarlinMoEScheme, quant_config=config, kernel=SimpleNamespace()),
        ),
        "moe_wna16": layer(bare(MoeWNA16Method, quant_config=config)),
        "FP4": layer(
            bare(
                Fp8MoEMethod,
                is_fp4_expert=True,
                dequant_fp4_to_fp8=False,
                block_quant=True,
                use_mxfp8=False,
                quant_config=fp8,
            )
        ),
    }
)
