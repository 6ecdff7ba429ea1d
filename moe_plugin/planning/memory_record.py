"""Device memory as two records: what a launch says about it, and what a plan makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .weight_bytes import Weights

MIB, GIB = 1 << 20, 1 << 30
CONTEXT_BYTES = 2 * GIB
"""Lost before the host measures: CUDA context, NCCL. Alone on an H200 1.3 GiB, beside other
starting servers up to 3 (benchmarks/results/*serving*.json)."""
PROMPTS = (1024, 8192, 32768)
"""Prompt lengths, tokens, whose prefill steps a plan counts: what a small T costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFacts:
    """What a launch says about memory; none of it is measured while it runs.

    Attributes:
        device_bytes: the device's total memory, as the host reads it.
        fraction: ``--mem-fraction-static`` as typed; None when the host would choose it.
        mla: the host counts the model's attention as MLA.
        kv_element: bytes per value of the KV cache.
        mla_row: bytes of one layer's MLA row in the KV cache where FP8 values are packed with
            scales and a positional part in bf16; 0 where all are of ``kv_element``.
        whole_dense: ``--moe-dense-tp-size 1``.
        whole_head: ``--enable-dp-lm-head``.
        draft_loaded: multi-token-prediction layers of the checkpoint are loaded as the draft.
        other_draft: weights of a draft from another checkpoint, as far as the host loads and keeps
            them; None without, or where it is not known how ranks divide them.
        other_draft_bytes: such a draft's bytes, all of which a rank may hold.
        kv_token_cap: ``--max-total-tokens``: most tokens of one DP group's KV cache; None without.
        tower_factor: what the host multiplies the fraction that it chooses by, for the towers of a
            multimodal model.
        media_bytes: what it takes out of the KV cache for embeddings and inputs of such towers.
        stock_media_bytes: the same without the plugin, which fills no running requests.
        tokens_alike: every token of the KV cache takes the same bytes: no states of linear
            attention in it, no sliding windows.
        state_bytes: states of linear attention of one request on one rank, where the host allocates
            them for all running requests, whatever memory there is; 0 elsewhere.
        state_share: share of the KV cache that they get where nobody says how many.
        groups_flag: the flag that the user typed attention-DP groups with, if not the present one.
    """

    device_bytes: int
    fraction: float | None = None
    mla: bool = False
    kv_element: float = 2.0
    mla_row: int = 0
    whole_dense: bool = False
    whole_head: bool = False
    draft_loaded: bool = False
    other_draft: Weights | None = None
    other_draft_bytes: int = 0
    kv_token_cap: int | None = None
    tower_factor: float = 1.0
    media_bytes: int = 0
    stock_media_bytes: int = 0
    tokens_alike: bool = True
    state_bytes: int = 0
    state_share: float = 0.0
    groups_flag: str = ""

    @property
    def usable_bytes(self) -> int:
        """What the host finds free before it loads weights."""
        return self.device_bytes - CONTEXT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank, as planned.

    Attributes:
        device_bytes: the device.
        usable_bytes: of it, free before weights are loaded.
        weights_bytes: loaded weights, with what is made of them; 0 where not known.
        weights_source: where they were read; empty where not known.
        loading_bytes: the most that is held while they are loaded, where they are quantised after
            that; 0 where they are loaded as they stay.
        buffer_bytes: the communication buffer on the device.
        workspace_bytes: the experts' working memory, in every allocator pool that runs them.
        graphs_bytes: what the host keeps for captured graphs.
        activations_bytes: and for everything else that runs.
        towers_bytes: what the host keeps for the towers of a multimodal model to run in, where it
            chooses the fraction.
        media_bytes: what it takes out of the KV cache for their embeddings and inputs.
        mem_fraction_static: share of usable memory for weights and KV cache.
        kv_token_cap: most tokens of it that the user allows (``--max-total-tokens``).
        kv_room_bytes: what is left for the KV cache; 0 or less where nothing is.
        kv_cache_bytes: what it takes of that: all, or what ``--max-total-tokens`` allows.
        kv_cache_tokens: the same in tokens of one DP group; None where not known, as with states of
            linear attention and sliding windows, whose share is the host's to say.
        kv_token_bytes: one such token; None where not known.
        stock_fraction: the fraction that the host alone would choose for the user's flags.
        stock_kv_bytes: what would then be left for the KV cache, or at the fraction that the user
            typed; it counts as much as the weights are known.
        host_fraction: the fraction that it would choose for this plan's budgets.
    """

    device_bytes: int
    usable_bytes: int
    weights_bytes: int
    weights_source: str
    buffer_bytes: int
    workspace_bytes: int
    graphs_bytes: int
    activations_bytes: int
    mem_fraction_static: float
    kv_token_bytes: int | None
    stock_fraction: float
    stock_kv_bytes: int
    host_fraction: float
    loading_bytes: int = 0
    towers_bytes: int = 0
    media_bytes: int = 0
    kv_token_cap: int | None = None
    kv_room_bytes: int = 0
    kv_cache_bytes: int = 0
    kv_cache_tokens: int | None = None

    @property
    def multimodal_bytes(self) -> int:
        """Kept for images, video and audio: towers, and what goes in and comes out."""
        return self.towers_bytes + self.media_bytes

    @property
    def stock_cache_bytes(self) -> int:
        """What the KV cache would take under the host alone."""
        return self._capped(self.stock_kv_bytes)

    @property
    def kv_tolerance_bytes(self) -> int:
        """A difference of KV caches that counts for nothing: half a percent, or the step of a
        fraction of three digits."""
        return max(self.usable_bytes // 1000, self.stock_cache_bytes // 200)

    @property
    def less_than_stock(self) -> bool:
        """Whether the KV cache is smaller than under the host alone."""
        return self.kv_cache_bytes + self.kv_tolerance_bytes < self.stock_cache_bytes

    def _capped(self, left: int) -> int:
        if self.kv_token_cap is None or not self.kv_token_bytes:
            return left
        return min(left, self.kv_token_cap * self.kv_token_bytes)

    def with_room(self, left: int) -> Memory:
        """The same with ``left`` bytes for the KV cache, of which it takes what it may."""
        cache, token = self._capped(left), self.kv_token_bytes
        tokens = max(0, cache) // token if token else None
        return replace(self, kv_room_bytes=left, kv_cache_bytes=cache, kv_cache_tokens=tokens)
