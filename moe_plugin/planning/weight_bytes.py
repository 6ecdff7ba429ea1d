"""Bytes of weights per rank: parts of a checkpoint, and which ranks hold how much of each.

Routed experts are divided over all ranks of a stage, attention over the ranks of a DP group, dense
MLPs and the head over all ranks or none, and everything else is held whole (sglang 0.5.23:
``models/deepseek_v2.py``, ``models/qwen2_moe.py``, ``layers/vocab_parallel_embedding.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .integers import ceil_div
from .model_shape import ModelShape

PARTS = ("experts", "heads", "kv", "whole", "dense", "embedding", "head")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_DRAFT = re.compile(r"(?:^|\.)mtp(?:_|\.)")
_TOWER = re.compile(r"(?:^|\.)(?:visual|vision|audio)")
_BY_HEADS = re.compile(
    r"\.(?:q|q_b|kv_b|o|out|qkv)_proj\.|\.(?:wq|wo|wq_b|wkv_b|query_key_value)\."
)
_BY_KV_HEADS = re.compile(r"\.[kv]_proj\.|\.w[kv]\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """How the ranks of a launch divide a model.

    Attributes:
        ranks: of one pipeline stage; also those that share the routed experts.
        attn_tp: ranks that share the heads of one DP group.
        stages: pipeline stages.
        redundant_experts: extra physical experts of each MoE layer.
        whole_dense: dense MLPs are held whole (``--moe-dense-tp-size 1``).
        whole_head: the head is divided as attention is (``--enable-dp-lm-head``).
        whole_embedding: the embedding is.
        draft: the draft layers of the checkpoint are loaded.
    """

    ranks: int = 1
    attn_tp: int = 1
    stages: int = 1
    redundant_experts: int = 0
    whole_dense: bool = False
    whole_head: bool = False
    whole_embedding: bool = False
    draft: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Bytes of a whole model by part, before ranks divide it.

    Attributes:
        source: where they were read.
        shape: the dimensions that say how a part is divided.
        target: bytes by :data:`PARTS`, without the draft's layers.
        draft: the same of the draft's layers.
        unloaded: bytes in the checkpoint that no rank keeps: the draft's own copies of embedding
            and head.
        before: the same weights as they are loaded, where the host quantises them once all of them
            are on the device; None where they are loaded as they stay.
    """

    source: str
    shape: ModelShape
    target: Mapping[str, int]
    draft: Mapping[str, int] = field(default_factory=dict)
    unloaded: int = 0
    before: Weights | None = None

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the files: everything once, and nothing that is made while loading."""
        return sum(self.target.values()) + sum(self.draft.values()) + self.unloaded

    def per_rank(self, topology: Topology) -> int:
        """Bytes on the rank that holds most."""
        shape, ranks = self.shape, topology.ranks
        layers = ceil_div(shape.layers, topology.stages) / max(1, shape.layers)
        body = _layers_per_rank(self.target, shape, topology) * layers
        absorbed = shape.absorbed_bytes() // topology.attn_tp
        made = absorbed * shape.attention_layers * layers
        if topology.draft:
            body += _layers_per_rank(self.draft, shape, topology)
            made += absorbed * (shape.draft_layers if self.draft else 0)
        by_attention = topology.attn_tp
        embedding = self.target["embedding"] // (
            by_attention if topology.whole_embedding else ranks
        )
        head = self.target["head"] // (by_attention if topology.whole_head else ranks)
        # Of several stages too: most models build their head on every one of them.
        return int(body + made) + embedding + head

    def loading_per_rank(self, topology: Topology) -> int:
        """Most bytes that the rank holds while it loads: all weights as they come, and one layer
        twice, which is being quantised (``DefaultModelLoader.postprocess_weights``). A draft is
        loaded after the target, and not counted."""
        target = replace(topology, draft=False)
        if self.before is None:
            return 0
        layers = max(1, ceil_div(self.shape.layers, topology.stages))
        return self.before.per_rank(target) + self.per_rank(target) // layers

    def kv_token_bytes(self, topology: Topology, element: float, row: int = 0) -> int:
        """KV cache of one token on one rank, ``element`` bytes per value.

        Args:
            topology: how the ranks divide the model.
            element: bytes per value.
            row: bytes of one layer's MLA row where it is not of such values alone.
        """
        shape = self.shape
        layers = ceil_div(shape.attention_layers, topology.stages)
        layers += shape.draft_layers if topology.draft else 0
        if shape.kv_lora:
            # The indexer's keys: FP8, with one float32 scale for 128.
            index = shape.index_dim + shape.index_dim // 32 if shape.index_heads else 0
            row = row or int((shape.kv_lora + shape.rope_dim) * element)
            return layers * (row + index)
        heads = max(1, shape.kv_heads // topology.attn_tp)
        return int(layers * heads * (shape.head_dim + shape.v_head_dim) * element)


def _layers_per_rank(parts: Mapping[str, int], shape: ModelShape, topology: Topology) -> float:
    if not parts:
        return 0.0
    copies = 1 + topology.redundant_experts / max(1, shape.experts)
    kv_ranks = min(topology.attn_tp, max(1, shape.kv_heads))
    return (
        parts["experts"] * copies / topology.ranks
        + parts["heads"] / topology.attn_tp
        + parts["kv"] / kv_ranks
        + parts["dense"] / (1 if topology.whole_dense else topology.ranks)
        + parts["whole"]
    )


def from_shape(shape: ModelShape) -> Weights:
    """What the dimensions say; MLA's second copies are not part of a checkpoint."""
    embedding = shape.vocabulary * shape.hidden * shape.dtype_bytes
    attention = shape.attention_bytes
    per_layer = {
        "heads": shape.heads_parameters() * attention,
        "kv": shape.kv_parameters() * attention,
        "whole": shape.whole_parameters() * attention + shape.index_parameters() * attention,
    }
    moe = {
        "experts": shape.experts * shape.expert_parameters * shape.expert_bytes,
        "whole": 3 * shape.hidden * shape.shared_intermediate * shape.dense_bytes
        + shape.experts * shape.expert_hidden * shape.dtype_bytes,
    }
    dense = 3 * shape.hidden * shape.dense_intermediate * shape.dense_bytes
    linear = shape.linear_layers * shape.linear_width * attention
    target = {
        name: shape.attention_layers * per_layer.get(name, 0) + shape.moe_layers * moe.get(name, 0)
        for name in PARTS
    }
    target["heads"] += linear
    target["dense"] += shape.dense_layers * dense
    target["whole"] += shape.tower_parameters * shape.dtype_bytes
    target["embedding"] = embedding
    target["head"] = 0 if shape.tied else embedding
    mlp = moe if shape.experts else {"dense": dense}
    draft = {
        name: shape.draft_layers * (per_layer.get(name, 0) + mlp.get(name, 0)) for name in PARTS
    }
    draft["whole"] += shape.draft_layers * 2 * shape.hidden**2 * shape.dtype_bytes  # eh_proj
    return Weights(
        source="config.json",
        shape=shape,
        target={name: int(size) for name, size in target.items()},
        draft={name: int(size) for name, size in draft.items()} if shape.draft_layers else {},
        # A checkpoint of draft layers alone has embedding and head once.
        unloaded=2 * embedding if shape.draft_layers and shape.layers else 0,
    )


def scaled(weights: Weights, total: int, source: str) -> Weights:
    """``weights`` with the checkpoint's own total: parts keep their proportions."""
    ratio = total / max(1, weights.checkpoint_bytes)
    return replace(
        weights,
        source=source,
        target={name: int(size * ratio) for name, size in weights.target.items()},
        draft={name: int(size * ratio) for name, size in weights.draft.items()},
        unloaded=int(weights.unloaded * ratio),
    )


def from_tensors(tensors: Iterable[tuple[str, int]], shape: ModelShape) -> Weights:
    """What the tensors of a checkpoint say, by name: (name, bytes) of each."""
    target, draft, unloaded = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0), 0
    for name, size in tensors:
        layer = _LAYER.search(name)
        part = part_of(name)
        if _DRAFT.search(name) or (layer and int(layer[1]) >= shape.layers):
            if part in ("embedding", "head"):
                unloaded += size
            else:
                draft[part] += size
        elif part == "head" and shape.tied:
            unloaded += size
        else:
            target[part] += size
    has_draft = any(draft.values())
    return Weights(
        source="safetensors headers",
        shape=shape,
        target=target,
        draft=draft if has_draft else {},
        unloaded=unloaded,
    )


def part_of(name: str) -> str:
    """Which of :data:`PARTS` a tensor belongs to."""
    if _TOWER.search(name):
        return "whole"
    if ".experts." in name:
        return "experts"
    if "embed_tokens" in name or "word_embeddings" in name:
        return "embedding"
    if "lm_head" in name or "shared_head.head" in name:
        return "head"
    if "attn" in name or "attention" in name:
        if ".indexer." in name:
            return "whole"
        if _BY_KV_HEADS.search(name):
            return "kv"
        return "heads" if _BY_HEADS.search(name) else "whole"
    if re.search(r"\.(?:mlp|feed_forward|ffn)\.(?:gate|up|down|gate_up)_proj\.", name):
        return "dense"
    return "whole"
