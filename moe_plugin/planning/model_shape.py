"""Dimensions of a model's weights, from its configuration: what they weigh when no file says so.

Matrices only, and what else counts: norms and biases are thousandths of a percent.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """One language model. Widths are bytes per parameter, scales included; sizes are elements.

    Attributes:
        layers: decoder layers, without the draft's.
        hidden: width of the residual.
        vocabulary: rows of the embedding.
        tied: the head is the embedding.
        heads: query heads.
        kv_heads: key-value heads; with MLA without meaning.
        head_dim: of queries and keys.
        v_head_dim: of values.
        gated_queries: queries carry an output gate as wide as they are.
        kv_lora: rank of the compressed keys and values (MLA); 0 without.
        q_lora: rank of the compressed queries; 0 without.
        rope_dim: positional part of an MLA key.
        nope_dim: the other part.
        index_heads: heads of a sparse-attention indexer; 0 without.
        index_dim: their width.
        linear_layers: layers with linear attention instead; their state is not in the KV cache.
        linear_width: parameters of one such layer, without its MLP.
        dense_layers: layers with a dense MLP.
        dense_intermediate: its inner width.
        experts: routed experts of an MoE layer.
        expert_hidden: outer width of an expert.
        expert_intermediate: its inner width.
        shared_intermediate: inner width of the shared experts together; 0 without.
        draft_layers: multi-token-prediction layers in the checkpoint, each with routed experts.
        expert_bytes: width of expert weights.
        attention_bytes: of attention projections.
        dense_bytes: of dense MLPs and shared experts.
        dtype_bytes: of what is not quantised.
        tower_parameters: parameters of a vision or audio tower.
    """

    layers: int
    hidden: int
    vocabulary: int
    tied: bool = False
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    gated_queries: bool = False
    kv_lora: int = 0
    q_lora: int = 0
    rope_dim: int = 0
    nope_dim: int = 0
    index_heads: int = 0
    index_dim: int = 0
    linear_layers: int = 0
    linear_width: int = 0
    dense_layers: int = 0
    dense_intermediate: int = 0
    experts: int
    expert_hidden: int
    expert_intermediate: int
    shared_intermediate: int = 0
    draft_layers: int = 0
    expert_bytes: float = 2.0
    attention_bytes: float = 2.0
    dense_bytes: float = 2.0
    dtype_bytes: int = 2
    tower_parameters: int = 0

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts, without the draft's."""
        return self.layers - self.dense_layers

    @property
    def attention_layers(self) -> int:
        """Layers whose keys and values are cached, without the draft's."""
        return self.layers - self.linear_layers

    @property
    def expert_parameters(self) -> int:
        """One routed expert: gate, up and down."""
        return 3 * self.expert_hidden * self.expert_intermediate

    def heads_parameters(self) -> int:
        """Attention of one layer, as far as it is split over attention-TP ranks by query heads."""
        out = self.heads * self.v_head_dim * self.hidden
        if self.kv_lora:
            queries = (self.q_lora or self.hidden) * self.heads * self.head_dim
            return queries + self.kv_lora * self.heads * (self.nope_dim + self.v_head_dim) + out
        return self.hidden * self.heads * self.head_dim * (2 if self.gated_queries else 1) + out

    def kv_parameters(self) -> int:
        """Key and value projections of one layer, split by KV heads; 0 with MLA."""
        return (
            0 if self.kv_lora else self.hidden * self.kv_heads * (self.head_dim + self.v_head_dim)
        )

    def whole_parameters(self) -> int:
        """Attention of one layer that every rank holds whole: MLA's compressions."""
        if not self.kv_lora:
            return 0
        return self.hidden * (self.q_lora + self.kv_lora + self.rope_dim)

    def index_parameters(self) -> int:
        """A sparse-attention indexer of one layer; every rank holds it whole."""
        queries = (self.q_lora or self.hidden) * self.index_heads * self.index_dim
        return queries + self.hidden * (self.index_dim + self.index_heads) * bool(self.index_heads)

    def absorbed_bytes(self) -> int:
        """MLA's up-projections a second time, as the host keeps them beside the loaded ones:
        ``w_kc`` and ``w_vc`` of one layer, in the activation dtype."""
        return 2 * self.kv_lora * self.heads * (self.nope_dim + self.v_head_dim)
