"""What a launch says about device memory: the host's total, its flags, the draft's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...planning.memory import DTYPE_BYTES
from ...planning.memory_record import MIB, MemoryFacts
from ...planning.weight_bytes import Weights
from .draft_facts import draft_config, own_draft
from .draft_weights import draft_weights
from .media_facts import media_bytes, tower_factor
from .model_facts import quantization_config
from .safetensors_files import read_checkpoint
from .state_facts import state_of_a_request, tokens_are_alike
from .weight_facts import weights_of

_KV_ELEMENT = {"fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "bf16": 2.0, "bfloat16": 2.0, "mxfp8": 1 + 1 / 32}
_KV_ELEMENT |= {"fp4_mx_block16": 0.5 + 1 / 16, "nvfp4": 0.5 + 1 / 16}


def memory_facts(
    server_args: Any, cfg: Any, dtype: str, *, late: bool = False
) -> MemoryFacts | None:
    """Facts of the device's memory; None where it is not known, or weights leave the device.

    ``late``: everything is resolved.

    The total, never what is free: every rank of every node has to come to the same plan.
    """
    from sglang.srt.arg_groups.model_override_base import use_mla_backend
    from sglang.srt.utils.common import get_device_memory_capacity

    if not str(cfg.device).startswith("cuda") or _offloads(cfg):
        return None
    total = get_device_memory_capacity(cfg.device)
    if total is None:
        return None
    element = kv_element(server_args, cfg, dtype)
    own, other, unknown = _draft(server_args, cfg, dtype)
    media, stock_media = media_bytes(server_args, cfg, late=late)
    state, share = state_of_a_request(server_args, cfg)
    return MemoryFacts(
        device_bytes=int(total * MIB),
        fraction=server_args.mem_fraction_static,
        mla=bool(use_mla_backend(server_args)),
        kv_element=element,
        mla_row=_packed_row(server_args, cfg) if element == 1 else 0,
        whole_dense=getattr(cfg, "moe_dense_tp_size", None) == 1,
        whole_head=bool(getattr(cfg, "enable_dp_lm_head", False)),
        draft_loaded=own,
        other_draft=other,
        other_draft_bytes=unknown,
        kv_token_cap=getattr(server_args, "max_total_tokens", None),
        tower_factor=tower_factor(server_args, cfg, total),
        media_bytes=media,
        stock_media_bytes=stock_media,
        tokens_alike=tokens_are_alike(server_args, cfg),
        state_bytes=state,
        state_share=share,
        groups_flag="--dp-size" if getattr(server_args, "enable_dp_attention", False) else "",
    )


def kv_element(server_args: Any, cfg: Any, dtype: str) -> float:
    """Bytes per value of the KV cache: by the flag, or by the checkpoint's own scales."""
    from sglang.srt.arg_groups.overrides import model_config_of

    name = str(cfg.kv_cache_dtype)
    # ``configure_kv_cache_dtype``: scales that are loaded need the pool that they are for.
    if name == "auto" and brings_kv_scales(quantization_config(model_config_of(server_args))):
        return 1.0
    return _KV_ELEMENT.get(name, float(DTYPE_BYTES.get(dtype, 2)))


def brings_kv_scales(config: Mapping[str, Any]) -> bool:
    """Whether the host loads FP8 scales of the KV cache: each of its methods has its own words."""
    scheme = config.get("kv_cache_scheme")
    scheme = scheme if isinstance(scheme, dict) else {}
    fp8 = (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    method = str(config.get("quant_method"))
    if method == "compressed-tensors":
        static = scheme.get("symmetric", True) and not scheme.get("dynamic", False)
        return bool(fp8 and static and scheme.get("strategy") == "tensor")
    if method.startswith("modelopt") and fp8:
        return True
    return str(config.get("kv_cache_quant_algo")).upper() == "FP8"


def _packed_row(server_args: Any, cfg: Any) -> int:
    """One MLA row of sparse attention in FP8, with a scale for 128 values and the positional part
    in bf16; 0 where kernels read plain rows (``calculate_mla_kv_cache_dim``)."""
    from sglang.srt.arg_groups.overrides import model_config_of

    text = model_config_of(server_args).hf_text_config
    prefill, decode = (getattr(cfg, f"dsa_{side}_backend", None) for side in ("prefill", "decode"))
    used = {"prefill": {prefill}, "decode": {decode}}.get(cfg.disaggregation_mode)
    plain = "trtllm" in (used or {prefill, decode}) or prefill == decode == "tilelang"
    if plain or not getattr(text, "index_n_heads", 0):
        return 0
    lora, rope = getattr(text, "kv_lora_rank", 0), getattr(text, "qk_rope_head_dim", 0)
    return lora + lora // 128 * 4 + 2 * rope if lora else 0


def _offloads(cfg: Any) -> bool:
    """Weights that do not stay on the device cannot be counted against it."""
    return bool(getattr(cfg, "cpu_offload_gb", 0) or 0) or (
        (getattr(cfg, "offload_group_size", 0) or 0) > 0
    )


def _draft(server_args: Any, cfg: Any, dtype: str) -> tuple[bool, Weights | None, int]:
    """(the checkpoint's own draft layers are loaded, weights of a draft from another checkpoint,
    its bytes where it is not known how ranks divide them)."""
    algorithm = str(cfg.speculative_algorithm or "").upper()
    if algorithm in ("", "NONE", "NGRAM"):
        return False, None, 0
    if own_draft(cfg):
        return True, None, 0
    divided = draft_weights(server_args, cfg, dtype)
    return False, divided, 0 if divided else _whole_draft(server_args, cfg, dtype)


def _whole_draft(server_args: Any, cfg: Any, dtype: str) -> int:
    """Bytes of a draft of which each rank may hold all; 0 where not known."""
    path = cfg.speculative_draft_model_path
    found = read_checkpoint(path, DTYPE_BYTES.get(dtype, 2))
    if found.tensors:
        return sum(size for _, size in found.tensors)
    if found.total:
        return found.total
    try:
        config = draft_config(server_args, cfg)
        text = getattr(config, "text_config", config)
        weights = weights_of(path, text, {}, weight_format="unquantized", dtype=dtype)
    except Exception:  # not readable here: the host will say so with its own message
        return 0
    return weights.checkpoint_bytes if weights else 0
