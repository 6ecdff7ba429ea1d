"""Facts of a launch, read from the host's arguments: the door from ``ServerArgs`` to planning."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ...batched_backend import BatchedBackend
from ...capability import backend_names, get_backend
from ...envs import MIXED_CHUNKS, TRANSPORT
from ...planning.compatibility import FLASHINFER_TILE
from ...planning.expert_choice import BF16_ROWS
from ...planning.facts import LaunchFacts
from ...planning.limits import Limits
from ..flags import requested
from .draft_facts import draft_has_routed_moe, draft_shape, draft_width, own_draft
from .graph_facts import (
    explicit_graph_max,
    graphs_enabled,
    prefill_graphs,
    surely_captures_prefills,
)
from .host_environment import environment_bool, environment_int
from .host_runners import batched_runners, is_foreign
from .lora_facts import adapts_experts

KEY_VALUE_STORES = ("redis://",)
"""Model paths that the host's only ``BaseKVConnector`` reads (``create_remote_connector``)."""


def attn_dp_size(cfg: Any) -> int:
    """Attention-DP groups. 0.5.20 and 0.5.21 spell it ``--dp-size N --enable-dp-attention``."""
    dp_groups = getattr(cfg, "attn_dp_size", None)
    if dp_groups is None:
        dp_groups = cfg.dp_size if cfg.enable_dp_attention else 1
    elif dp_groups == 1 and getattr(cfg, "enable_dp_attention", False):
        dp_groups = cfg.dp_size
    return max(1, int(dp_groups))


def backend_of(name: str) -> BatchedBackend:
    """The backend registered under ``name``, or one without any property where none is."""
    if name in backend_names():
        return get_backend(name)
    return BatchedBackend(name=name, batched_modes=lambda _: frozenset(), limits=Limits())


def transport_of(cfg: Any, backend: str) -> str:
    """Who moves the rows: the backend itself, or torch in the place of DeepEP.

    torch where it was asked for, and on a CPU.
    """
    if backend != "deepep":
        return backend
    asked = TRANSPORT.read()
    if asked != "auto":
        return asked
    return "torch" if cfg.device == "cpu" else "deepep"


def dispatch_dtype(cfg: Any, backend: str) -> tuple[str, str]:
    """(dtype of dispatched rows that the user asked for, or ``auto``; flag or variable)."""
    flag = "--deepep-dispatcher-output-dtype"
    own = backend_of(backend).bf16_variable
    if own is None:
        return "auto", flag  # which this backend does not read
    if own:
        asked = {None: "auto", False: "fp8", True: "bf16"}[environment_bool(own)]
        return asked, own
    asked = getattr(cfg, "deepep_dispatcher_output_dtype", None) or "auto"
    if asked == "auto" and environment_bool(BF16_ROWS):
        return "bf16", BF16_ROWS
    return ("fp8" if asked == "int8" else str(asked)), flag  # as the host does off NPUs


def deterministic(cfg: Any) -> bool:
    """Whether a token must get the same bits in any batch."""
    # The host turns the second into the first, after we have planned.
    on_policy = getattr(cfg, "rl_on_policy_target", None) is not None
    return on_policy or bool(getattr(cfg, "enable_deterministic_inference", False))


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


def _may_mix_chunks(cfg: Any) -> bool:
    """Whether nothing in the launch refuses mixed chunks, or was not looked at with them."""
    names = ("enable_lora", "lora_paths", "enable_hisparse", "enable_layernorm_sp")
    if deterministic(cfg) or any(getattr(cfg, name, None) for name in names):
        return False
    if getattr(cfg, "cuda_graph_backend_prefill", None) not in (None, "breakable", "full"):
        return False  # the host asserts one of these
    return MIXED_CHUNKS.read() and getattr(cfg, "attn_cp_size", 1) in (None, 1)


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
    late: bool = False,
) -> LaunchFacts:
    """Facts of the launch as far as resolution has come.

    Args:
        server_args: the raw record.
        cfg: the host's live view of it.
        backend: all-to-all backend to plan for; the view's by default.
        mode: deepep mode to plan for; the view's by default.
        late: the host has resolved everything: the view's chunk is one DP group's.
    """
    request = requested(server_args)
    draft_backend = getattr(cfg, "speculative_moe_a2a_backend", None)
    dp_groups = attn_dp_size(cfg)
    a2a = backend_of(backend or cfg.moe_a2a_backend)
    dtype, dtype_source = dispatch_dtype(cfg, a2a.name)
    capability = compute_capability(cfg)
    return LaunchFacts(
        a2a_backend=a2a.name,
        backend_late=server_args.moe_a2a_backend != a2a.name and request.switch != "on",
        deepep_mode=mode or cfg.deepep_mode,
        disaggregation_mode=cfg.disaggregation_mode,
        device=str(cfg.device),
        transport=transport_of(cfg, a2a.name),
        tp_size=cfg.tp_size,
        attn_dp_size=dp_groups,
        attn_cp_size=max(1, int(getattr(cfg, "attn_cp_size", 1) or 1)),
        pp_size=cfg.pp_size,
        redundant_experts=cfg.ep_num_redundant_experts,
        draft_width=draft_width(server_args, cfg),
        typed_draft_tokens=server_args.speculative_num_draft_tokens or 1,
        draft_has_routed_moe=draft_has_routed_moe(server_args, cfg),
        draft_a2a_backend=draft_backend,
        two_batch_overlap=cfg.enable_two_batch_overlap,
        mixed_chunk=cfg.enable_mixed_chunk,
        may_mix_chunks=_may_mix_chunks(cfg),
        resolved=late,
        dynamic_chunking=bool(getattr(cfg, "enable_dynamic_chunking", False)),
        max_prefill_tokens=cfg.max_prefill_tokens,
        page_size=max(1, int(cfg.page_size or 1)),
        decode_graphs=graphs_enabled(server_args, cfg, "decode"),
        prefill_graphs=prefill_graphs(server_args, cfg, a2a.name),
        surely_captures_prefills=surely_captures_prefills(server_args, cfg, capability),
        required=request.switch == "on",
        max_tokens=request.max_tokens,
        max_tokens_source=request.max_tokens_source,
        qp_depth=environment_int("NVSHMEM_QP_DEPTH"),
        chunked_prefill_size=server_args.chunked_prefill_size,
        dp_group_chunk=cfg.chunked_prefill_size if late else None,
        max_running_requests=server_args.max_running_requests,
        cuda_graph_max_bs_prefill=explicit_graph_max(server_args, "prefill", a2a.name),
        cuda_graph_max_bs_decode=explicit_graph_max(server_args, "decode"),
        moe_runner_backend=cfg.moe_runner_backend,
        runner_typed=cfg.moe_runner_backend == server_args.moe_runner_backend,
        foreign_runner=is_foreign(cfg.moe_runner_backend),
        host_runners=batched_runners(),
        has_deep_gemm=find_spec("deep_gemm") is not None,
        deep_gemm_switched_off=environment_bool("SGLANG_ENABLE_JIT_DEEPGEMM") is False,
        dispatch_dtype=dtype,
        dispatch_dtype_source=dtype_source,
        layers_by_runner=environment_bool(BF16_ROWS) is True,
        compute_capability=capability,
        single_batch_overlap=cfg.enable_single_batch_overlap,
        lora=adapts_experts(cfg),
        waterfill=bool(getattr(cfg, "enable_waterfill", False)),
        fuses_experts=bool(server_args.enforce_shared_experts_fusion),
        rebalances=bool(cfg.enable_eplb),
        symmetric_memory=bool(getattr(cfg, "enable_symm_mem", False)),
        moe_dp_size=int(getattr(cfg, "moe_dp_size", 1) or 1),
        whole_rows=a2a.whole_rows
        or (bool(getattr(cfg, "disable_attn_tp_gather", False)) and dp_groups == 1),
        scattered_graphs=a2a.whole_rows,
        whole_graphs=a2a.whole_graphs,
        chunk_alignment=chunk_alignment(cfg),
        diffusion=bool(getattr(cfg, "dllm_algorithm", None)),
        pipeline_warmup=environment_bool("SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP") is True,
        moe_dense_tp_size=cfg.moe_dense_tp_size,
        dp_lm_head=bool(cfg.enable_dp_lm_head),
        tp_lm_head_all_to_all=bool(server_args.enable_tp_lm_head_all_to_all),
        separate_draft=bool(cfg.speculative_algorithm) and not own_draft(cfg),
        draft_shape=draft_shape(server_args, cfg, a2a.name),
        load_format=str(cfg.load_format),
        key_value_store=str(cfg.model_path).startswith(KEY_VALUE_STORES),
        weight_cache=getattr(cfg, "weight_cache_mode", "off") != "off",
    )
