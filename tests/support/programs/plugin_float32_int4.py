"""A plugin beside ours: int4 checkpoints are served in float32 as well, so that two routes to the
same sum differ by rounding only. The host's own list of dtypes is that of its GPU kernels."""

import torch


def register():
    """The list alone changes."""
    from sglang.srt.layers.quantization.compressed_tensors import compressed_tensors

    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    compressed_tensors.CompressedTensorsConfig.get_supported_act_dtypes = lambda *_: dtypes
