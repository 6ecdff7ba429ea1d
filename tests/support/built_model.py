"""The host's own model of a resolved launch: what its layers weigh, and what computes its experts.

Built by the host's loader on the meta device, as rank 0 would build it, so that every answer is the
host's: shards, quantisation methods, runners and their registries. Imported by the worker process
when a case asks for it: it loads model code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import deep_gemm  # the planning process's stand-in
import torch

torch.cuda.Stream = torch.cuda.Event = mock.MagicMock  # type: ignore[misc,assignment]
deep_gemm.get_num_sms = lambda: 132

from sglang.srt.arg_groups.model_override_base import resolved_view  # noqa: E402
from sglang.srt.arg_groups.overrides import model_config_of, use_mla_backend  # noqa: E402
from sglang.srt.configs.hybrid_arch import mambaish_config  # noqa: E402
from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.layers import deep_gemm_wrapper, dual_gemm, logits_processor  # noqa: E402
from sglang.srt.layers.deep_gemm_wrapper import configurer  # noqa: E402
from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE  # noqa: E402
from sglang.srt.layers.moe.fused_moe_triton import layer as fused_moe  # noqa: E402
from sglang.srt.layers.moe.moe_runner.base import PermuteMethodPool  # noqa: E402
from sglang.srt.layers.moe.utils import (  # noqa: E402
    DeepEPMode,
    draft_model_build_scope,
    get_deepep_output_dtype,
    get_moe_a2a_backend,
    initialize_moe_config,
    speculative_moe_a2a_backend_context,
    speculative_moe_backend_context,
)
from sglang.srt.layers.rotary_embedding import rope_variant  # noqa: E402
from sglang.srt.mem_cache.kv_cache_dtype import configure_kv_cache_dtype  # noqa: E402
from sglang.srt.model_executor.model_runner_components.layer_setup import (  # noqa: E402
    resolve_layer_indices,
)
from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator  # noqa: E402
from sglang.srt.model_loader import loader  # noqa: E402
from sglang.srt.runtime_context import (  # noqa: E402
    attn_dp_enabled_of,
    get_flags,
    get_parallel,
    publish,
)
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm  # noqa: E402

from moe_plugin.errors import MoePluginError  # noqa: E402
from moe_plugin.integration.serve.expert_weights import (  # noqa: E402
    layer_activation,
    loaded_format,
)

_RANKS = ("tp_rank", "attn_tp_rank", "attn_dp_rank", "attn_cp_rank", "moe_ep_rank", "moe_tp_rank",
          "pp_rank")  # fmt: skip


class _Dispatcher:
    """In the place of the host's, which needs process groups."""

    def __init__(self, config: Any) -> None:
        self.runner_backend = config.runner_backend
        self.quant_config: Any = None

    def set_quant_config(self, config: Any) -> None:
        self.quant_config = config


def _dispatcher(config: Any, quant_method: Any = None) -> _Dispatcher:
    del quant_method
    return _Dispatcher(config)


def _no_cache(rotary: Any) -> torch.Tensor:
    del rotary
    return torch.empty(0)


def _group(size: int) -> Any:
    return mock.MagicMock(
        rank_in_group=0, world_size=size, is_first_rank=True, is_last_rank=size == 1
    )


@contextmanager
def _as_rank_zero(view: Any, dtype: torch.dtype) -> Iterator[None]:
    """The process as the host's loader finds it on rank 0, on the meta device."""
    parallel, before = get_parallel(), torch.get_default_dtype()
    names: dict[str, Any] = dict.fromkeys(_RANKS, 0)
    names["pp_group"] = _group(view.pp_size)
    names |= {
        f"{name}_group": _group(getattr(parallel, f"{name}_size"))
        for name in ("tp", "attn_tp", "moe_ep", "moe_tp")
    }
    with ExitStack() as stack:
        for owner, name, value in (
            (fused_moe, "create_moe_dispatcher", _dispatcher),
            (deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", configurer._compute_enable_deep_gemm()),
            (logits_processor, "triton_symm_mem_ag", mock.MagicMock()),  # asks process groups
            (dual_gemm, "is_cuda", lambda: False),  # a kernel of dense layers, compiled on a GPU
            # It names the device itself.
            (rope_variant.DeepseekScalingRotaryEmbedding, "_compute_cos_sin_cache", _no_cache),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        flags = get_flags().dp
        stack.enter_context(mock.patch.object(flags, "enabled", attn_dp_enabled_of(view)))
        stack.enter_context(parallel.override(**names))
        stack.enter_context(torch.device("meta"))
        stack.callback(torch.set_default_dtype, before)
        torch.set_default_dtype(dtype)
        yield


def _loaded(config: Any) -> Any:
    quantization = loader._get_quantization_config(config, LoadConfig())
    return loader._initialize_model(config, LoadConfig(), quantization)


def built_draft(server_args: Any) -> dict[str, int]:
    """Weights of rank 0's draft in bytes, and of them embedding and head."""
    publish(server_args, role="scheduler")
    initialize_moe_config()
    view = resolved_view(server_args)
    config = ModelConfig.from_server_args(
        server_args, model_path=view.speculative_draft_model_path, is_draft_model=True
    )
    with (
        _as_rank_zero(view, config.dtype),
        speculative_moe_backend_context(),
        speculative_moe_a2a_backend_context(),
        draft_model_build_scope(),
    ):
        model = _loaded(config)
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    ends = sum(size for name, size in sizes.items() if "embed" in name or "lm_head" in name)
    return {"weights": sum(sizes.values()), "ends": ends}


def built(server_args: Any) -> dict[str, Any]:
    """Weights of rank 0 in bytes, kinds of MoE layers, or why the host builds none."""
    publish(server_args, role="scheduler")
    try:
        initialize_moe_config()
    except ValueError as error:  # what it refuses before it builds anything
        return {"error": f"{type(error).__name__}: {error}", "weights": 0, "layers": []}
    view = resolved_view(server_args)
    config = model_config_of(server_args)
    with _as_rank_zero(view, config.dtype):
        try:
            model = _loaded(config)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}", "weights": 0, "layers": []}
        weights = sum(
            parameter.numel() * parameter.element_size()
            for name, parameter in model.named_parameters()
            if not name.endswith("_swizzled")  # shares the scales' memory once they are loaded
        )
        mode = DeepEPMode(view.deepep_mode)
        kinds: list[dict[str, Any]] = []
        for layer in model.modules():
            if isinstance(layer, fused_moe.FusedMoE):
                kind = _kind(layer, mode)
                if kind not in kinds:
                    kinds.append(kind)
        token = _kv_token_bytes(server_args, view, config, model)
        return {
            "error": "",
            "weights": weights,
            "layers": kinds,
            "kv_token": token,
            "hidden": config.hidden_size,
            "device": torch.cuda.get_device_properties(0).total_memory,
        }


def _kv_token_bytes(server_args: Any, view: Any, config: Any, model: Any) -> int:
    """The KV cache of one token on rank 0, without a draft's layers."""
    name, dtype = configure_kv_cache_dtype(
        server_args_kv_cache_dtype=view.kv_cache_dtype,
        model=model,
        model_dtype=config.dtype,
        is_draft_worker=False,
        is_dflash=False,
        speculative_draft_attention_backend="",
    )
    layers = resolve_layer_indices(model=model, model_config=config, is_draft_worker=False)
    pool = SimpleNamespace(
        model_config=config,
        kv_cache_dtype=dtype,
        kv_cache_dtype_str=name or view.kv_cache_dtype,
        use_mla_backend=use_mla_backend(server_args),
        layer_info=layers,
        mambaish_config=mambaish_config(config),
        is_draft_worker=False,
        server_args=server_args,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        page_size=view.page_size,
        device="cuda",
        pp_size=view.pp_size,
        kv_shard_spec=None,
        kv_shard_size=1,
    )
    return int(DefaultPoolConfigurator(pool)._cell_size)


def _kind(layer: Any, mode: DeepEPMode) -> dict[str, Any]:
    formats = []
    if get_moe_a2a_backend().is_deepep_v2():
        formats = ["deepep_v2"]
    else:
        formats += ["deepep_normal"] if mode.enable_normal() else []
        formats += ["deepep_ll"] if mode.enable_low_latency() else []
    return {
        "class": type(layer).__name__,
        "method": type(layer.quant_method).__name__,
        "runner": layer.runner_backend.value if layer.runner_backend is not None else None,
        "experts": layer.num_experts,
        "local": layer.num_local_experts,
        "inter": layer.intermediate_size_per_partition,
        "takes": {name: _takes(layer, name) for name in formats},
        "rows": get_deepep_output_dtype(layer.dispatcher).value,
        "ours": _ours(layer),
    }


def _takes(layer: Any, dispatched: str) -> str:
    """What of the host computes rows of a dispatch format; or "fails: ..."."""
    if not isinstance(layer, DeepEPMoE):
        return f"fails: {type(layer).__name__}"
    if not layer.deprecate_flag:
        if layer.use_w4afp8 and dispatched != "deepep_v2":
            return "cutlass_w4afp8"
        return "fails: run_moe_core"
    made = getattr(layer.quant_method, "runner", None)
    if made is None:
        return "fails: its method makes no runner"
    if made.fused_func is not None:
        return f"fused {made.runner_backend.value}" if dispatched == "deepep_ll" else "fails: fused"
    name = made.runner_core.runner_backend.value
    try:
        PermuteMethodPool.get_pre_permute(dispatched, name)
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}"
    if name == "deep_gemm" and not deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM:
        return "fails: no DeepGEMM"
    return str(name)


def _ours(layer: Any) -> str:
    """The format that our experts read of the layer; or "fails: ..."."""
    try:
        layer_activation(layer)
        if getattr(layer, "w13_weight_bias", None) is not None:
            return "fails: biases"
        return str(loaded_format(layer).name)
    except (MoePluginError, AttributeError) as error:
        return f"fails: {error}"
