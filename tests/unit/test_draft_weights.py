"""Weights of a draft from another checkpoint: what is loaded of its files, and what ranks hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe_plugin.integration.resolve import draft_weights
from moe_plugin.integration.resolve.safetensors_files import INDEX
from moe_plugin.planning.device_memory import draft_bytes
from moe_plugin.planning.memory_record import MemoryFacts
from moe_plugin.planning.weight_bytes import Topology, Weights, from_shape

from .test_weights import QWEN_30B, shape

CONFIG = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 4,
          "num_key_value_heads": 4, "head_dim": 2, "vocab_size": 16, "num_experts": 4,
          "moe_intermediate_size": 8, "intermediate_size": 8}  # fmt: skip
RANKS = Topology(ranks=4, attn_tp=2, whole_embedding=True, whole_dense=True)
ATTENTION, EXPERTS, WHOLE = 4 * 8 * 8, 4 * 3 * 8 * 8, 2 * 8 * 8
"""Elements of one draft layer: four projections, experts, and the one of embedding and state."""
VOCABULARY = 16 * 8


def tensors(layer: int) -> dict[str, torch.Tensor]:
    """One draft layer, with its own copies of embedding and head."""
    square = torch.zeros(8, 8, dtype=torch.bfloat16)
    names = [f"self_attn.{name}_proj" for name in "qkvo"]
    names += [f"mlp.experts.{e}.{name}_proj" for e in range(4) for name in ("gate", "up", "down")]
    found = {f"model.layers.{layer}.{name}.weight": square.clone() for name in names}
    for name in ("eh_proj", "embed_tokens", "shared_head.head"):
        found[f"model.layers.{layer}.{name}.weight"] = torch.zeros(16, 8, dtype=torch.bfloat16)
    return found


def weights_of(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: str,
    stored: str,
    algorithm: str = "EAGLE",
    **changes: Any,
) -> Weights | None:
    """Of a checkpoint at ``path``, whose class the host takes for another."""
    config = {**CONFIG, **changes}
    (path / "config.json").write_text(json.dumps({**config, "architectures": [stored]}))
    text = SimpleNamespace(**config, architectures=[loaded])
    model = SimpleNamespace(hf_config=text, hf_text_config=text, quantization=None)
    monkeypatch.setattr(draft_weights, "draft_config", lambda *_: text)
    monkeypatch.setattr(draft_weights, "_draft_model", lambda *_: model)
    launch = SimpleNamespace(speculative_algorithm=algorithm, speculative_draft_model_path=path)
    return draft_weights.draft_weights(None, launch, "bfloat16")


def per_rank(weights: Weights | None) -> int:
    """On the rank that holds most."""
    return draft_bytes(MemoryFacts(device_bytes=1, other_draft=weights), RANKS)


@pytest.mark.parametrize(
    ("loaded", "stored", "layer"),
    [
        ("DeepseekV3ForCausalLMNextN", "DeepseekV3ForCausalLMNextN", 0),
        ("DeepseekV3ForCausalLMNextN", "DeepseekV3ForCausalLM", 2),
        ("Qwen3MoeForCausalLMMTP", "Qwen3MoeForCausalLM", 2),
    ],
)
def test_the_draft_layers_alone_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: str, stored: str, layer: int
) -> None:
    """Of a checkpoint of draft layers, and of a whole model; embedding and head are the target's.
    Files and dimensions say the same."""
    found = tensors(layer)
    if layer:  # the whole model's own layers
        found |= {name.replace("layers.2.", "layers.1."): size for name, size in found.items()}
    save_file({name: tensor.clone() for name, tensor in found.items()}, tmp_path / "a.safetensors")
    rank = 2 * (ATTENTION // 2 + EXPERTS // 4 + WHOLE)
    weights = weights_of(tmp_path, monkeypatch, loaded, stored)
    assert weights is not None
    assert weights.source == "safetensors headers"
    assert per_rank(weights) == rank
    (tmp_path / "a.safetensors").unlink()
    planned = weights_of(tmp_path, monkeypatch, loaded, stored)
    router = 2 * 4 * 8
    assert per_rank(planned) == rank + router


def test_an_index_without_embedding_and_head_says_nothing_of_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its total would shrink them; a larger one counts."""
    name = ("DeepseekV3ForCausalLMNextN",) * 2
    planned = weights_of(tmp_path, monkeypatch, *name)
    assert planned is not None
    ranks = []
    for total in (planned.checkpoint_bytes, 10 * planned.checkpoint_bytes):
        index = {"metadata": {"total_size": total}, "weight_map": {"a": "b.safetensors"}}
        (tmp_path / INDEX).write_text(json.dumps(index))
        ranks.append(per_rank(weights_of(tmp_path, monkeypatch, *name)))
    assert ranks[0] == per_rank(planned)  # which counts neither
    assert ranks[1] > 2 * ranks[0]


def test_the_layers_that_the_host_makes_count_where_no_file_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standalone draft of a model without draft layers: one layer, and its own embedding."""
    found = {f"model.layers.1.{i}.weight": t.clone() for i, t in enumerate(tensors(1).values())}
    save_file(found | {"lm_head.weight": torch.zeros(16, 8)}, tmp_path / "a.safetensors")
    names = ("Qwen3MoeForCausalLMMTP", "Qwen3MoeForCausalLM")
    rank = 2 * (ATTENTION // 2 + EXPERTS // 4 + WHOLE + 4 * 8)
    weights = weights_of(tmp_path, monkeypatch, *names, algorithm="STANDALONE")
    assert per_rank(weights) == rank + 2 * VOCABULARY // 4


def test_a_dense_draft_is_divided_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standalone one with embedding and head, which the target's flag for dense layers does not
    reach; what runs within one DP group, or is not understood, is not divided."""
    names, dense = ("Qwen3ForCausalLM",) * 2, {"num_experts": 0}
    weights = weights_of(tmp_path, monkeypatch, *names, algorithm="STANDALONE", **dense)
    layers = 2 * (ATTENTION // 2 + 3 * 8 * 8 // 4)
    assert per_rank(weights) == 2 * (layers + VOCABULARY // 2 + VOCABULARY // 4)
    for changes in ({"algorithm": "EAGLE3"}, {"compress_ratios": [4]}):
        assert weights_of(tmp_path, monkeypatch, *names, **{**dense, **changes}) is None


def test_a_draft_spans_no_stages() -> None:
    """It is whole on the last one; its bytes count on every rank where nothing else is known."""
    weights = from_shape(shape(QWEN_30B))
    facts = MemoryFacts(device_bytes=1, other_draft=weights)
    alone = replace(RANKS, stages=1)
    assert draft_bytes(facts, replace(RANKS, stages=4)) == draft_bytes(facts, alone)
    assert draft_bytes(MemoryFacts(device_bytes=1, other_draft_bytes=7), RANKS) == 7
