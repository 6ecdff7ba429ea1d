"""The dtype of the rows that layers of an FP8 checkpoint ask for."""

from types import SimpleNamespace

import torch
from program_io import emit

from moe_plugin.integration.serve import moe_layer, process


class Layer:
    """A layer, and its dispatcher."""

    layer_id = 3
    deprecate_flag = False
    quant_config = object()  # of the checkpoint, which may leave this layer out

    def __init__(self, dtype):
        self.w13_weight = torch.empty(2, 256, 128, dtype=dtype)
        self.w13_weight_scale_inv = torch.empty(2, 2, 1)
        self.asked = None
        self.dispatcher = self

    def set_quant_config(self, config):
        self.asked = config["dispatcher_output_dtype"]


def asked(dtype, flag="auto", backend="deepep"):
    """What a layer of this dtype asks for under the host's flag, or the refusal."""
    layer = Layer(dtype)
    moe_layer._backend = lambda: backend
    process.host_config = lambda: SimpleNamespace(deepep_dispatcher_output_dtype=flag)
    try:
        moe_layer._attach_runner(lambda *args: None, layer, None, (), {})
    except Exception as error:
        return str(error)
    return layer.asked


moe_layer._make_runner = lambda layer, plan: None
emit(
    [
        asked(torch.float8_e4m3fn),
        asked(torch.bfloat16),
        asked(torch.bfloat16, "fp8"),
        asked(torch.bfloat16, backend="mooncake"),
        asked(torch.bfloat16, backend="nixl"),
        asked(torch.float8_e4m3fn, backend="nixl"),
    ]
)
