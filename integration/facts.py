"""Facts of a launch, read from the host's arguments: the only reader of ``ServerArgs`` we have."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from ..envs import TRANSPORT
from ..facts import LaunchFacts, ModelFacts
from ..support import FLASHINFER_TILE, NO_DISPATCHER
from .flags import requested
from .speculation import draft_has_routed_moe, draft_shape, draft_width

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "experts_per_token",
)
# Clamped or scaled SwiGLU (DeepSeek-V4, Step-3.5, MiniMax-M3, ...): the models hand these to the
# host's experts as swiglu_limit, gemm1_alpha or gemm1_clamp_limit.
_ACTIVATION_LIMITS = (
    "swiglu_limit", "swiglu_limits", "swiglu_alpha", "expert_swiglu_limit_list",
    "activation_situ_beta",
)  # fmt: skip
_CLAMP_ALONE = frozenset({"Step3p5ForCausalLM", "BailingMoeV3ForCausalLM", "GigaChat35ForCausalLM"})
"""Models that give the experts ``gemm1_clamp_limit`` alone: the host's DeepGEMM ignores it."""
_TRANSFORMERS = "TransformersMoEForCausalLM"
_INTERMEDIATE = ("moe_intermediate_size", "moe_hidden_size", "intermediate_size")


def _first(config: Any, names: tuple[str, ...]) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):  # per layer in a few models
            value = max((item for item in value if isinstance(item, int)), default=None)
        if isinstance(value, int) and value > 0:
            return value
    return 0


def routed_experts(config: Any) -> int:
    """Routed experts of one layer in a Hugging Face text config; 0 for a dense model."""
    return _first(config, _EXPERTS)


def model_facts(server_args: Any) -> ModelFacts:
    """Facts of the target model, from the host's own ``ModelConfig``."""
    from sglang.srt.arg_groups.overrides import model_config_of

    model = model_config_of(server_args)
    text = model.hf_text_config
    experts = routed_experts(text)
    top_k = _first(text, _TOP_K)
    name = architecture(model)
    return ModelFacts(
        architecture=name,
        hidden_size=_first(text, ("routed_expert_hidden_size", "hidden_size")),
        num_experts=experts,
        top_k=top_k,
        moe_intermediate_size=_first(text, _INTERMEDIATE),
        context_length=int(getattr(model, "context_len", 0) or 0),
        dtype=str(model.dtype).removeprefix("torch."),
        weight_format=weight_format(server_args, model),
        hidden_act=activation(text, name),
        has_routed_moe=experts > 1 and top_k > 0 and name not in NO_DISPATCHER,
    )


def architecture(model: Any) -> str:
    """Class name in the checkpoint, or of the host's wrapper around transformers' own model."""
    if str(getattr(model, "model_impl", "")).rpartition(".")[2].lower() == "transformers":
        return _TRANSFORMERS
    return str((getattr(model.hf_config, "architectures", None) or [""])[0])


def activation(text: Any, architecture: str) -> str:
    """Name of the experts' activation, marked where the host clamps or scales it."""
    name = str(getattr(text, "hidden_act", None) or "silu")
    limits = [getattr(text, attribute, None) for attribute in _ACTIVATION_LIMITS]
    # Lists are per layer, with nothing or zero where a layer has no limit.
    limited = any(any(value) if isinstance(value, (list, tuple)) else value for value in limits)
    if not limited:
        return name
    return f"{name}, {'clamped' if architecture in _CLAMP_ALONE else 'limited'}"


def weight_format(server_args: Any, model: Any) -> str:
    """``unquantized`` or the name of the quantization, refined where runners tell kinds apart."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    name = resolved_view(server_args).quantization or getattr(model, "quantization", None)
    config = getattr(model.hf_config, "quantization_config", None) or getattr(
        model.hf_text_config, "quantization_config", None
    )
    config = config if isinstance(config, dict) else {}
    name = name or config.get("quant_method")
    if not name:
        return "unquantized"
    dequantised = environment_bool("SGLANG_DSV4_FP4_DEQUANT")
    if getattr(model, "is_fp4_experts", False) and not dequantised:
        return "fp8_fp4" if name == "fp8" else "mxfp4"
    if name == "fp8":
        block = config.get("weight_block_size")
        return "fp8_tensor" if not block else f"fp8_block{'' if block == [128, 128] else block}"
    return str(name)


def attn_dp_size(cfg: Any) -> int:
    """Attention-DP groups. 0.5.20 and 0.5.21 spell it ``--dp-size N --enable-dp-attention``."""
    groups = getattr(cfg, "attn_dp_size", None)
    if groups is None:
        groups = cfg.dp_size if cfg.enable_dp_attention else 1
    elif groups == 1 and getattr(cfg, "enable_dp_attention", False):
        groups = cfg.dp_size
    return max(1, int(groups))


def transport_of(cfg: Any) -> str:
    """``deepep`` or ``torch``: asked for, or DeepEP everywhere but on a CPU."""
    asked = TRANSPORT.read()
    if asked != "auto":
        return asked
    return "torch" if cfg.device == "cpu" else "deepep"


def explicit_graph_max(server_args: Any, phase: str) -> int | None:
    """Largest capture size that the user named for a phase, by flag, list or JSON."""
    config = server_args.cuda_graph_config
    config = config.to_dict() if hasattr(config, "to_dict") else config or {}
    named = config.get(phase) if isinstance(config, dict) else None
    named = named if isinstance(named, dict) else {}
    sizes = named.get("bs") or getattr(server_args, f"cuda_graph_bs_{phase}", None)
    if sizes:
        return int(max(sizes))
    largest = named.get("max_bs") or getattr(server_args, f"cuda_graph_max_bs_{phase}", None)
    return int(largest) if largest else None


def graphs_enabled(server_args: Any, cfg: Any, phase: str) -> bool:
    """Whether a phase may capture graphs. Before the host decided: unless it was switched off."""
    if cfg.device == "cpu":
        return False
    if getattr(server_args, "_cuda_graph_config_locked", None) is not None:
        config = cfg.cuda_graph_config
        return config is not None and getattr(config, phase).backend != "disabled"
    backend = getattr(cfg, f"cuda_graph_backend_{phase}", None)
    if backend is not None:  # named, it wins over the flag for both phases
        return bool(backend != "disabled")
    if getattr(cfg, "disable_cuda_graph", False):
        return False
    return not getattr(cfg, f"disable_{phase}_cuda_graph", False)


def environment_int(name: str | None) -> int | None:
    """An integer variable; None when unset or when the host would ignore it as no integer."""
    text = os.environ.get(name or "", "").strip()
    try:
        return int(text) if text else None
    except ValueError:
        return None


def environment_bool(name: str) -> bool | None:
    """A switch as the host reads it; None when unset or unreadable."""
    text = os.environ.get(name, "").strip().lower()
    if text in ("1", "true", "yes", "y"):
        return True
    return False if text in ("0", "false", "no", "n") else None


def dispatch_dtype(cfg: Any) -> tuple[str, str]:
    """(dtype of dispatched rows that the user asked for, or ``auto``; flag or variable)."""
    flag, variable = "--deepep-dispatcher-output-dtype", "SGLANG_DEEPEP_BF16_DISPATCH"
    asked = getattr(cfg, "deepep_dispatcher_output_dtype", None) or "auto"
    if asked == "auto" and environment_bool(variable):
        return "bf16", variable
    return ("fp8" if asked == "int8" else str(asked)), flag  # as the host does off NPUs


def deterministic(cfg: Any) -> bool:
    """Whether a token must get the same bits in any batch."""
    return bool(getattr(cfg, "enable_deterministic_inference", False))


def prefill_attention(cfg: Any) -> str | None:
    """The attention backend of prefills."""
    backend: str | None = getattr(cfg, "prefill_attention_backend", None) or cfg.attention_backend
    return backend


def chunk_alignment(cfg: Any) -> int:
    """Tokens of a prefill chunk below which the host's scheduler refuses to start
    (``Scheduler.check_truncation_align_fits_chunk``)."""
    if not deterministic(cfg) or prefill_attention(cfg) != "flashinfer":
        return 1
    return environment_int(FLASHINFER_TILE) or 4096


def compute_capability(cfg: Any) -> tuple[int, int] | None:
    """(major, minor) of the CUDA device, or None off CUDA."""
    if not str(cfg.device).startswith("cuda"):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return int(major), int(minor)


def launch_facts(
    server_args: Any,
    cfg: Any,
    *,
    backend: str | None = None,
    mode: str | None = None,
    capacity: int | None = None,
    late: bool = False,
) -> LaunchFacts:
    """Facts of the launch as far as resolution has come.

    Args:
        server_args: the raw record.
        cfg: the host's live view of it.
        backend: all-to-all backend to plan for; the view's by default.
        mode: deepep mode to plan for; the view's by default.
        capacity: the capacity variable as the *user* set it.
        late: the host has resolved everything: the view's chunk is one group's.
    """
    request = requested(server_args)
    draft_backend = getattr(cfg, "speculative_moe_a2a_backend", None)
    groups = attn_dp_size(cfg)
    dtype, dtype_source = dispatch_dtype(cfg)
    return LaunchFacts(
        a2a_backend=backend or cfg.moe_a2a_backend,
        deepep_mode=mode or cfg.deepep_mode,
        disaggregation_mode=cfg.disaggregation_mode,
        device=str(cfg.device),
        transport=transport_of(cfg),
        tp_size=cfg.tp_size,
        attn_dp_size=groups,
        attn_cp_size=max(1, int(getattr(cfg, "attn_cp_size", 1) or 1)),
        pp_size=cfg.pp_size,
        redundant_experts=cfg.ep_num_redundant_experts,
        draft_width=draft_width(server_args, cfg),
        draft_has_routed_moe=draft_has_routed_moe(server_args, cfg),
        draft_a2a_backend=draft_backend,
        two_batch_overlap=cfg.enable_two_batch_overlap,
        mixed_chunk=cfg.enable_mixed_chunk,
        dynamic_chunking=bool(getattr(cfg, "enable_dynamic_chunking", False)),
        max_prefill_tokens=cfg.max_prefill_tokens,
        page_size=max(1, int(cfg.page_size or 1)),
        decode_graphs=graphs_enabled(server_args, cfg, "decode"),
        prefill_graphs=graphs_enabled(server_args, cfg, "prefill"),
        max_tokens=request.max_tokens,
        max_tokens_source=request.max_tokens_source,
        capacity=capacity,
        qp_depth=environment_int("NVSHMEM_QP_DEPTH"),
        chunked_prefill_size=server_args.chunked_prefill_size,
        group_chunk=cfg.chunked_prefill_size if late else None,
        max_running_requests=server_args.max_running_requests,
        cuda_graph_max_bs_prefill=explicit_graph_max(server_args, "prefill"),
        cuda_graph_max_bs_decode=explicit_graph_max(server_args, "decode"),
        moe_runner_backend=cfg.moe_runner_backend,
        has_deep_gemm=find_spec("deep_gemm") is not None,
        deep_gemm_switched_off=environment_bool("SGLANG_ENABLE_JIT_DEEPGEMM") is False,
        dispatch_dtype=dtype,
        dispatch_dtype_source=dtype_source,
        compute_capability=compute_capability(cfg),
        single_batch_overlap=cfg.enable_single_batch_overlap,
        lora=bool(cfg.enable_lora or (cfg.enable_lora is None and cfg.lora_paths)),
        waterfill=bool(getattr(cfg, "enable_waterfill", False)),
        whole_rows=bool(getattr(cfg, "disable_attn_tp_gather", False)) and groups == 1,
        chunk_alignment=chunk_alignment(cfg),
        diffusion=bool(getattr(cfg, "dllm_algorithm", None)),
        pipeline_warmup=environment_bool("SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP") is True,
        draft_shape=draft_shape(server_args, cfg, backend or cfg.moe_a2a_backend),
    )
