"""What the host keeps for images, video and audio of a multimodal model.

Most of it is a factor on the fraction that the host chooses, for towers that run beside the
language model. What their results are stored in comes out of the KV cache, whoever chose the
fraction.
"""

from __future__ import annotations

from typing import Any

from ...planning.memory_record import MIB
from ..host_checks import check_symbol
from ..host_symbols import VISION_FACTOR
from .foresight import of_model
from .host_environment import environment_int

DEVICE_TRANSPORTS = frozenset({"cuda_ipc", "cuda_vmm"})
"""Transports of a tower's inputs that hold a pool on the device."""

EMBEDDINGS_MIB, POOL_MIB = 100, 1024
"""The host's defaults for tower outputs that it keeps, and for that pool."""

MANY_REQUESTS, POOL_OF_MANY_MIB = 400, 3 * 1024
"""From so many running requests on the host makes that pool so large for some models
(``model_overrides/qwen3_vl.py``)."""


def tower_factor(server_args: Any, cfg: Any, total_mib: float) -> float:
    """What the host multiplies the fraction that it chooses by (``handle_gpu_memory_settings``),
    where it does not size the KV cache after capture: that is known once graphs are."""
    from sglang.srt.arg_groups.overrides import model_config_of

    model = model_config_of(server_args)
    words_only = any(getattr(cfg, f"language_{name}", False) for name in ("only", "model_only"))
    if not model.is_multimodal or words_only or cfg.disaggregation_mode == "decode":
        return 1.0
    if check_symbol(VISION_FACTOR) is not None:
        return 1.0
    from sglang.srt.arg_groups.memory_hook import adjust_mem_fraction_for_vlm

    return float(adjust_mem_fraction_for_vlm(1.0, model, False, total_mib))


def media_bytes(server_args: Any, cfg: Any, *, late: bool) -> tuple[int, int]:
    """What the host takes out of the KV cache for embeddings and for the inputs of towers
    (``kv_cache_configurator.py: mm_runtime_reservation_gb``): with the running requests that a plan
    fills, and without. They count unless everything is resolved (``late``)."""
    from sglang.srt.arg_groups.overrides import model_config_of

    if not model_config_of(server_args).is_multimodal:
        return 0, 0
    transport = getattr(cfg, "mm_feature_transport", None)
    if not late:  # asked first, because it also sets the variable below
        transport = of_model(server_args).get("mm_feature_transport", transport)
    size = environment_int("SGLANG_VLM_CACHE_SIZE_MB")
    size = EMBEDDINGS_MIB if size is None else size
    if transport not in DEVICE_TRANSPORTS:
        return size * MIB, size * MIB
    pool, typed = environment_int("SGLANG_MM_FEATURE_CACHE_MB"), server_args.max_running_requests

    def whole(running: int) -> int:
        many = not late and running >= MANY_REQUESTS
        return (size + ((POOL_OF_MANY_MIB if many else POOL_MIB) if pool is None else pool)) * MIB

    return whole(MANY_REQUESTS if typed is None else typed), whole(typed or 0)
