"""What a launch says about device memory: the host's total, its flags, the draft's weights."""

from __future__ import annotations

from typing import Any

from ...planning.memory import DTYPE_BYTES
from ...planning.memory_record import MIB, MemoryFacts
from .draft_facts import draft_config
from .safetensors_files import read_checkpoint
from .weight_facts import weights_of

_KV_ELEMENT = {"fp8_e4m3": 1.0, "fp8_e5m2": 1.0, "bf16": 2.0, "bfloat16": 2.0, "mxfp8": 1 + 1 / 32}
_KV_ELEMENT |= {"fp4_e2m1": 0.5 + 1 / 16, "nvfp4": 0.5 + 1 / 16, "int8": 1.0}


def memory_facts(server_args: Any, cfg: Any, dtype: str) -> MemoryFacts | None:
    """Facts of the device's memory; None where it is not known, or weights leave the device.

    The total, never what is free: every rank of every node has to come to the same plan.
    """
    from sglang.srt.arg_groups.model_override_base import use_mla_backend
    from sglang.srt.utils.common import get_device_memory_capacity

    if not str(cfg.device).startswith("cuda") or _offloads(cfg):
        return None
    total = get_device_memory_capacity(cfg.device)
    if total is None:
        return None
    element = _KV_ELEMENT.get(str(cfg.kv_cache_dtype), float(DTYPE_BYTES.get(dtype, 2)))
    own, other = _draft(server_args, cfg, dtype)
    return MemoryFacts(
        device_bytes=int(total * MIB),
        fraction=server_args.mem_fraction_static,
        mla=bool(use_mla_backend(server_args)),
        kv_element=element,
        whole_dense=getattr(cfg, "moe_dense_tp_size", None) == 1,
        whole_head=bool(getattr(cfg, "enable_dp_lm_head", False)),
        draft_loaded=own,
        other_draft_bytes=other,
        kv_token_cap=getattr(server_args, "max_total_tokens", None),
        groups_flag="--dp-size" if getattr(server_args, "enable_dp_attention", False) else "",
    )


def _offloads(cfg: Any) -> bool:
    """Weights that do not stay on the device cannot be counted against it."""
    return bool(getattr(cfg, "cpu_offload_gb", 0) or 0) or (
        (getattr(cfg, "offload_group_size", 0) or 0) > 0
    )


def _draft(server_args: Any, cfg: Any, dtype: str) -> tuple[bool, int]:
    """(the checkpoint's own draft layers are loaded, bytes of a draft from another checkpoint)."""
    algorithm = str(cfg.speculative_algorithm or "").upper()
    if algorithm in ("", "NONE", "NGRAM"):
        return False, 0
    path = cfg.speculative_draft_model_path
    if not path or path == cfg.model_path:
        return True, 0
    found = read_checkpoint(path, DTYPE_BYTES.get(dtype, 2))
    if found.tensors:
        return False, sum(size for _, size in found.tensors)
    if found.total:
        return False, found.total
    try:
        config = draft_config(server_args, cfg)
        text = getattr(config, "text_config", config)
        weights = weights_of(path, text, {}, weight_format="unquantized", dtype=dtype)
    except Exception:  # not readable here: the host will say so with its own message
        return False, 0
    return False, weights.checkpoint_bytes if weights else 0
