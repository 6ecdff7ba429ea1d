"""What a plan is made from: facts of the model, and of the launch. Plain values only.

All of them follow from arguments and model config, never from free memory or a live process, so
that every rank of every node derives the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, lcm

from ..batched_backend import CapabilityFacts
from .memory_record import MemoryFacts
from .weight_bytes import Weights

GRAPH_MULTIPLE = 8
"""Token counts that are captured are multiples of 8: others can hang all-to-all capture
(``apply_deepep_adjustments`` of the host)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The routed experts of one model, from its config.

    Attributes:
        architecture: class name in ``architectures``.
        hidden_size: width of a dispatched row, elements.
        num_experts: routed experts of one layer, without redundant copies.
        top_k: experts per token.
        wraps: class of the language model inside it, where that is another one of the host's.
        moe_intermediate_size: inner width of one expert, elements.
        context_length: longest sequence, tokens.
        dtype: activation dtype by torch name.
        weight_format: expert weights: ``unquantized``, or the name of the quantization;
            ``fp8_fp4`` are FP4 experts in an FP8 checkpoint.
        hidden_act: activation of the experts; "silu, limited" where it is clamped or scaled in a
            way that the host's DeepGEMM knows, "silu, clamped" where it leaves the clamp out.
        fuses_shared: under waterfill, or where the flag for it is typed, each rank holds the shared
            expert as one more routed one.
        has_routed_moe: the model has at least one routed MoE layer.
        weights: bytes of its weights by part; None where they are not known.
    """

    architecture: str = ""
    wraps: str = ""
    hidden_size: int
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    context_length: int
    dtype: str = "bfloat16"
    weight_format: str = "unquantized"
    hidden_act: str = "silu"
    fuses_shared: bool = False
    has_routed_moe: bool = True
    weights: Weights | None = None

    @property
    def classes(self) -> frozenset[str]:
        """What the host's lists of models may know it by."""
        return frozenset({self.architecture, self.wraps} - {""})


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchFacts:
    """One launch: topology, modes, and what the user set. ``None`` means not set by the user.

    Attributes:
        a2a_backend: the all-to-all backend, as resolved.
        backend_late: the host selects the backend by itself, once memory is sized.
        deepep_mode: ``auto``, ``normal`` or ``low_latency``.
        disaggregation_mode: ``null``, ``prefill`` or ``decode``.
        device: ``cuda``, ``cpu``, ...
        transport: the backend's name, or ``torch`` in DeepEP's place.
        tp_size: ranks of one pipeline stage; also the expert-parallel ranks.
        attn_dp_size: attention data-parallel groups inside them.
        attn_cp_size: attention context-parallel ranks inside one such group.
        pp_size: pipeline stages.
        redundant_experts: extra physical experts (EPLB).
        draft_width: rows per running request in the widest decode-like forward; 1 without
            speculative decoding.
        typed_draft_tokens: ``--speculative-num-draft-tokens`` as typed, else 1: the host's memory
            rule goes by it.
        draft_has_routed_moe: the draft model has routed MoE layers.
        draft_a2a_backend: all-to-all backend of the draft; None follows the target's.
        two_batch_overlap: the host splits batches in two.
        mixed_chunk: decode rows ride along with prefill chunks.
        may_mix_chunks: they may by default: nothing else of the launch speaks against it.
        dynamic_chunking: the host resizes chunks under pipeline parallelism.
        resolved: the host has resolved everything: nothing is filled any more.
        max_prefill_tokens: the host's cap of a prefill batch, tokens (never None there).
        page_size: KV-cache page, tokens; the host wants chunks in whole pages.
        decode_graphs: decode CUDA graphs are captured.
        prefill_graphs: prefill CUDA graphs are captured.
        surely_captures_prefills: the host captures them for certain, and breakable ones.
        required: ``--use-batched-dp-moe on``: what T cannot carry is refused. Under ``auto`` caps
            that the host would take are lowered instead.
        max_tokens: T as our flag or variable says.
        max_tokens_source: the flag or variable it came from.
        host_tokens_per_rank: T as the user set it in the host's variable.
        qp_depth: ``NVSHMEM_QP_DEPTH``.
        chunked_prefill_size: as typed, before the host divides by attention DP; <= 0 is off.
        dp_group_chunk: chunk of one DP group as the host resolved it; None until it has, and then
            only what was typed is known (:attr:`known_chunk`).
        max_running_requests: as typed, over all DP groups.
        cuda_graph_max_bs_prefill: tokens per DP group.
        cuda_graph_max_bs_decode: requests per DP group.
        moe_runner_backend: ``auto``, the user's choice, or what the host makes of ``auto``.
        runner_typed: it is the user's choice, ``auto`` included; not the host's.
        foreign_runner: the runner is another plugin's.
        host_runners: runners that this host has functions for low-latency rows for.
        has_deep_gemm: DeepGEMM is installed.
        deep_gemm_switched_off: ``SGLANG_ENABLE_JIT_DEEPGEMM=0``.
        dispatch_dtype: what the user wants rows dispatched in, ``auto`` or a dtype of the host's.
        dispatch_dtype_source: the flag or variable it came from.
        layers_by_runner: ``SGLANG_DEEPEP_BF16_DISPATCH`` is on: with it the host's layers leave
            their rows to a runner, whatever the backend.
        compute_capability: (major, minor) of the device; None on a CPU.
        single_batch_overlap: ``--enable-single-batch-overlap``.
        lora: LoRA adapters of routed experts are served.
        waterfill: ``--enable-waterfill``.
        fuses_experts: ``--enforce-shared-experts-fusion``.
        rebalances: ``--enable-eplb``.
        moe_dp_size: ``--moe-dp-size``.
        symmetric_memory: ``--enable-symm-mem``.
        whole_rows: attention-TP ranks may all dispatch all of a group's rows
            (``--disable-attn-tp-gather`` without attention DP), or the host counts them so;
        scattered_graphs: captured batches divide over these ranks all the same (pplx);
        whole_graphs: or it counts those of the largest decode graph so.
        chunk_alignment: tokens that a prefill chunk must at least hold, or the scheduler refuses.
        diffusion: a diffusion LLM decodes blocks (``--dllm-algorithm``).
        pipeline_warmup: ``SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP`` is on.
        moe_dense_tp_size: ranks that share a dense layer; None is the host's choice.
        dp_lm_head: the LM head is shared inside each DP group only (``--enable-dp-lm-head``).
        tp_lm_head_all_to_all: it is shared by all ranks, as typed, and does not go with that.
        separate_draft: speculation with a draft model of its own, not the target's layers.
        draft_shape: (hidden size, routed experts) of a draft model on the same all-to-all; None
            without one, or when it repeats the target's layers.
        memory: what is known of the device's memory; None where nothing is (CPU).
        default_tokens: tokens per rank where the user names none and needs no more; None for the
            transport's default.
        follows_cap: T is made as large as a typed cap on running requests asks for, where that may
            also be lowered.
        decode_graph_cap: most requests that a decode graph is filled with; None for as many as fit.
        running_cap: running requests of a DP group that states of linear attention leave room for,
            where each takes memory; None elsewhere.
        load_format: ``--load-format``, as resolved.
        key_value_store: the model path is one of a key-value store: parameters of another server.
        weight_cache: a daemon holds the weights for several servers (``--weight-cache-mode``).
    """

    a2a_backend: str = "deepep"
    backend_late: bool = False
    deepep_mode: str = "low_latency"
    disaggregation_mode: str = "null"
    device: str = "cuda"
    transport: str = "deepep"
    tp_size: int = 1
    attn_dp_size: int = 1
    attn_cp_size: int = 1
    pp_size: int = 1
    redundant_experts: int = 0
    draft_width: int = 1
    typed_draft_tokens: int = 1
    draft_has_routed_moe: bool = False
    draft_a2a_backend: str | None = None
    two_batch_overlap: bool = False
    mixed_chunk: bool = False
    may_mix_chunks: bool = False
    resolved: bool = False
    dynamic_chunking: bool = False
    max_prefill_tokens: int = 16384
    page_size: int = 1
    decode_graphs: bool = True
    prefill_graphs: bool = True
    surely_captures_prefills: bool = True
    required: bool = True
    max_tokens: int | None = None
    max_tokens_source: str = "--batched-dp-moe-max-tokens"
    host_tokens_per_rank: int | None = None
    qp_depth: int | None = None
    chunked_prefill_size: int | None = None
    dp_group_chunk: int | None = None
    max_running_requests: int | None = None
    cuda_graph_max_bs_prefill: int | None = None
    cuda_graph_max_bs_decode: int | None = None
    moe_runner_backend: str = "auto"
    runner_typed: bool = True
    foreign_runner: bool = False
    host_runners: frozenset[str] = frozenset({"deep_gemm", "humming", "flashinfer_cutedsl"})
    has_deep_gemm: bool = True
    deep_gemm_switched_off: bool = False
    dispatch_dtype: str = "auto"
    dispatch_dtype_source: str = "--deepep-dispatcher-output-dtype"
    layers_by_runner: bool = False
    compute_capability: tuple[int, int] | None = (9, 0)
    single_batch_overlap: bool = False
    lora: bool = False
    waterfill: bool = False
    fuses_experts: bool = False
    rebalances: bool = False
    moe_dp_size: int = 1
    symmetric_memory: bool = False
    whole_rows: bool = False
    scattered_graphs: bool = False
    whole_graphs: bool = False
    chunk_alignment: int = 1
    diffusion: bool = False
    pipeline_warmup: bool = False
    moe_dense_tp_size: int | None = None
    dp_lm_head: bool = False
    tp_lm_head_all_to_all: bool = False
    separate_draft: bool = False
    draft_shape: tuple[int, int] | None = None
    memory: MemoryFacts | None = None
    default_tokens: int | None = None
    follows_cap: bool = True
    decode_graph_cap: int | None = None
    running_cap: int | None = None
    load_format: str = "auto"
    key_value_store: bool = False
    weight_cache: bool = False

    @property
    def attn_tp_size(self) -> int:
        """Ranks that one DP group's rows are scattered over before a dispatch."""
        return 1 if self.whole_rows else self.attention_ranks

    @property
    def attention_ranks(self) -> int:
        """Attention-TP ranks of a DP group."""
        return max(1, self.tp_size // self.attn_dp_size // self.attn_cp_size)

    @property
    def known_chunk(self) -> int:
        """Chunk of one DP group, as resolved or as typed; 0 when unknown or off."""
        if self.dp_group_chunk is not None:
            return max(0, self.dp_group_chunk)
        return max(0, (self.chunked_prefill_size or 0) // self.attn_dp_size)

    @property
    def graph_multiple(self) -> int:
        """Multiple of captured batch sizes: the host's alignment, and 8."""
        return lcm(GRAPH_MULTIPLE, self.host_alignment)

    @property
    def host_alignment(self) -> int:
        """``get_cuda_graph_batch_size_alignment`` of the host with gathered buffers."""
        ranks = self.attention_ranks if self.scattered_graphs else self.attn_tp_size
        alignment = ranks * (2 if self.two_batch_overlap else 1)
        if alignment % self.attn_cp_size:
            alignment *= self.attn_cp_size
        return alignment

    @property
    def capture_multiple(self) -> int:
        """Multiple of the decode batches that the host captures: their rows divide by the
        alignment (``base_cuda_graph_runner.py: get_batch_sizes_to_capture``)."""
        if self.two_batch_overlap:
            return self.host_alignment
        return self.host_alignment // gcd(self.draft_width, self.host_alignment)

    @property
    def grows_chunks(self) -> bool:
        """Whether the host resizes chunks: it does so in pipelines only."""
        return self.dynamic_chunking and self.pp_size > 1

    def capability_facts(self, model: ModelFacts) -> CapabilityFacts:
        """What the capability predicate may see of this launch."""
        return CapabilityFacts(
            a2a_backend=self.a2a_backend,
            deepep_mode=self.deepep_mode,
            disaggregation_mode=self.disaggregation_mode,
            has_routed_moe=model.has_routed_moe,
            draft_has_routed_moe=self.draft_has_routed_moe,
            draft_a2a_backend=self.draft_a2a_backend,
        )


def physical_experts(model: ModelFacts, launch: LaunchFacts) -> int:
    """Experts of one layer over all ranks, as the communication buffer counts them."""
    shared = launch.tp_size if fused_flags(model, launch) and model.fuses_shared else 0
    return model.num_experts + launch.redundant_experts + shared


def fused_flags(model: ModelFacts, launch: LaunchFacts) -> tuple[str, ...]:
    """Flags that add a shared expert per rank and a top-k slot."""
    asked = {
        "--enable-waterfill": launch.waterfill,
        "--enforce-shared-experts-fusion": launch.fuses_experts and model.fuses_shared,
    }
    return tuple(flag for flag, on in asked.items() if on)
