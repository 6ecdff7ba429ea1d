"""An out-of-tree SGLang platform: the real server on a machine without a GPU.

Selected only by name (``SGLANG_PLATFORM=moe_plugin_cpu``); installed but unselected it does
nothing. SGLang's own CPU engine needs AMX kernels that link against libcuda, this does not.
"""

from __future__ import annotations

import os
from typing import Any

NAME = "moe_plugin_cpu"


def _selected() -> bool:
    return os.environ.get("SGLANG_PLATFORM") == NAME


def select() -> str | None:
    """Entry point of group ``sglang.srt.platforms``."""
    return f"{__name__}.CpuTestPlatform" if _selected() else None


def register() -> None:
    """Entry point of group ``sglang.srt.plugins``: what the host's CPU path lacks."""
    if not _selected():
        return

    import torch
    import torch.distributed as dist
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    # Scheduling with several ranks asks the attention backend for these, graphs or not.
    def one(_self: Any) -> int:
        return 1

    TorchNativeAttnBackend.get_cuda_graph_seq_len_fill_value = one
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = one

    # Attention TP scatters rows through operators that have no CPU kernels.
    def reduce_scatter(self: Any, output: Any, input: Any) -> None:
        whole = self.all_reduce(input.clone())
        output.copy_(whole.tensor_split(self.world_size)[self.rank_in_group])

    def all_gather(self: Any, output: Any, input: Any) -> None:
        dist.all_gather_into_tensor(output, input, group=self.device_group)

    GroupCoordinator.reduce_scatter_tensor = reduce_scatter
    GroupCoordinator.all_gather_into_tensor = all_gather

    # EPLB asks for the device's module without saying which; a CUDA build of torch says CUDA.
    module_of = torch.get_device_module
    torch.get_device_module = lambda device=None: module_of("cpu" if device is None else device)
    torch.cpu.empty_cache = lambda: None

    # Decides pinned memory, which needs CUDA; computed at import from the in-tree platform.
    import sglang.srt.model_executor.forward_batch_info as forward_batch_info

    forward_batch_info._is_cpu = True


def __getattr__(name: str) -> Any:
    """Build the platform class on first use: importing this module must not import sglang."""
    if name != "CpuTestPlatform":
        raise AttributeError(name)
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.platforms.device_mixin import PlatformEnum
    from sglang.srt.platforms.interface import SRTPlatform

    class CpuTestPlatform(CpuDeviceMixin, SRTPlatform):
        _enum = PlatformEnum.OOT

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_dispatch_key_name(self) -> str:
            return "native"

    globals()[name] = CpuTestPlatform
    return CpuTestPlatform
