"""Bytes of weights: public parameter counts, the files of a checkpoint, and what ranks hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_plugin.integration.resolve.safetensors_files import INDEX, read_checkpoint
from moe_plugin.integration.resolve.weight_facts import shape_of, weights_of
from moe_plugin.planning.model_shape import ModelShape
from moe_plugin.planning.weight_bytes import Topology, from_shape, part_of

from ..support.serving.checkpoint import Shape, write_checkpoint

GIB = 1 << 30
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
MLA = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
       "v_head_dim": 128, "num_experts_per_tok": 8, "hidden_size": 7168,
       "moe_intermediate_size": 2048, "num_hidden_layers": 61, "n_shared_experts": 1,
       "intermediate_size": 18432, "moe_layer_freq": 1}  # fmt: skip
V3 = {**MLA, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256,
      "first_k_dense_replace": 3, "vocab_size": 129280, "num_nextn_predict_layers": 1}  # fmt: skip
KIMI_K2 = {**MLA, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384,
           "first_k_dense_replace": 1, "vocab_size": 163840}  # fmt: skip
QWEN = {"num_experts": 128, "num_experts_per_tok": 8, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
QWEN_30B = {**QWEN, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_hidden_layers": 48, "num_attention_heads": 32}  # fmt: skip
QWEN_235B = {**QWEN, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 94,
             "moe_intermediate_size": 1536, "num_attention_heads": 64}  # fmt: skip
GLM_45 = {"hidden_size": 5120, "num_hidden_layers": 92, "num_attention_heads": 96,
          "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 160,
          "moe_intermediate_size": 1536, "intermediate_size": 12288, "n_shared_experts": 1,
          "first_k_dense_replace": 3, "vocab_size": 151552,
          "num_nextn_predict_layers": 1}  # fmt: skip
QWEN3_NEXT = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
              "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512,
              "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
              "vocab_size": 151936, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
              "linear_num_value_heads": 32, "linear_value_head_dim": 128,
              "full_attention_interval": 4}  # fmt: skip


def shape(config: dict[str, Any], quantization: dict[str, Any] | None = None) -> ModelShape:
    """Dimensions of a configuration, in bf16 or FP8 blocks."""
    found = shape_of(
        SimpleNamespace(**config),
        quantization or {},
        weight_format="fp8_block" if quantization else "unquantized",
        dtype="bfloat16",
    )
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        (V3, 671.0),
        (KIMI_K2, 1026.4),
        (QWEN_30B, 30.5),
        (QWEN_235B, 235.1),
        (GLM_45, 352.8),  # 355 with the draft's layer
        (QWEN3_NEXT, 79.7),
    ],
)
def test_parameters_are_those_in_public(config: dict[str, Any], billions: float) -> None:
    """Two bytes each; the draft's layer apart."""
    weights = from_shape(shape(config))
    assert sum(weights.target.values()) / 2e9 == pytest.approx(billions, rel=0.005)


def test_a_public_checkpoint_is_as_large_as_planned() -> None:
    """DeepSeek-V3 in FP8 blocks, with the draft's layer: about 642 GiB."""
    weights = from_shape(shape(V3, FP8))
    assert weights.checkpoint_bytes / GIB == pytest.approx(642, rel=0.002)


@pytest.mark.parametrize(("ranks", "gib"), [(8, 93.3), (16, 55.1), (32, 36.0), (64, 26.4)])
def test_more_ranks_share_the_experts_only(ranks: int, gib: float) -> None:
    """With attention DP: 76 GiB of experts over 8 ranks, 17 of everything else on each."""
    weights = from_shape(shape(V3, FP8))
    assert weights.per_rank(Topology(ranks=ranks, whole_embedding=True)) / GIB == pytest.approx(
        gib, abs=0.1
    )


def test_each_choice_costs_what_it_replicates() -> None:
    """Flags that hold a part whole, redundant experts, the draft, and fewer attention ranks."""
    v3 = shape(V3, FP8)
    weights, base = from_shape(v3), Topology(ranks=16, whole_embedding=True)
    plain = weights.per_rank(base)
    width = 1 + 4 / 128**2
    head, dense = v3.vocabulary * v3.hidden * 2, 3 * 3 * v3.hidden * 18432 * width

    def extra(**changes: Any) -> int:
        return weights.per_rank(replace(base, **changes)) - plain

    assert extra(whole_head=True) == pytest.approx(head * 15 / 16, rel=1e-6)
    assert extra(whole_dense=True) == pytest.approx(dense * 15 / 16, rel=1e-6)
    expert = 3 * 7168 * 2048 * width
    assert extra(redundant_experts=32) == pytest.approx(58 * 2 * expert, rel=1e-6)
    assert extra(draft=True) > 16 * expert
    assert extra(attn_tp=4) < 0
    assert weights.per_rank(replace(base, stages=2)) < 0.6 * plain


def test_kv_cache_of_a_token() -> None:
    """MLA: 576 values a layer on each rank. Grouped queries: heads over attention TP, not below
    one; the draft's layer has its own."""
    v3, qwen = from_shape(shape(V3, FP8)), from_shape(shape(QWEN_235B))
    assert v3.kv_token_bytes(Topology(), 2) == 61 * 576 * 2
    assert v3.kv_token_bytes(Topology(draft=True), 2) == 62 * 576 * 2
    assert qwen.kv_token_bytes(Topology(attn_tp=2), 2) == 94 * 2 * 256 * 2
    assert qwen.kv_token_bytes(Topology(attn_tp=8), 1) == 94 * 256


@pytest.mark.parametrize(
    ("name", "quantization", "expert", "attention"),
    [
        ("unquantized", {}, 2.0, 2.0),
        ("fp8_block", FP8, 1.0, 1.0),
        ("fp8_block", {**FP8, "modules_to_not_convert": ["self_attn"]}, 1.0, 2.0),
        ("w4afp8", {}, 0.5, 1.0),
        ("modelopt_fp4", {}, 0.5625, 2.0),
        ("fp8_fp4", {}, 0.53125, 1.0),
        (
            "compressed-tensors",
            {
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}},
                "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
            },
            0.5625,
            2.0,
        ),
        ("humming", FP8, 1.0, 1.0),  # what the checkpoint holds, repacked
        ("humming", {"quant_method": "gptq", "bits": 4, "group_size": 128}, 0.515625, 0.515625),
        ("humming_fp4", FP8, 0.53125, 1.0),
    ],
)
def test_each_part_has_its_own_width(
    name: str, quantization: dict[str, Any], expert: float, attention: float
) -> None:
    """Experts and attention of the formats that are served; scales are a few percent at most."""
    found = shape_of(SimpleNamespace(**V3), quantization, weight_format=name, dtype="bfloat16")
    assert found is not None
    assert found.expert_bytes == pytest.approx(expert, rel=0.04)
    assert found.attention_bytes == pytest.approx(attention, rel=0.04)


def test_what_is_not_understood_is_not_known() -> None:
    """A format or layers of another kind: no weights rather than wrong ones."""
    for config, name in (
        (V3, "tomorrow"),
        ({**V3, "compress_ratios": [4]}, "fp8_block"),
        (V3, "humming"),
    ):
        assert shape_of(SimpleNamespace(**config), {}, weight_format=name, dtype="bfloat16") is None
    without = {name: value for name, value in V3.items() if name != "vocab_size"}
    assert shape_of(SimpleNamespace(**without), {}, weight_format="fp8_block", dtype="f") is None


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.3.mlp.experts.7.gate_proj.weight", "experts"),
        ("model.layers.3.mlp.experts.7.down_proj.weight_scale_inv", "experts"),
        ("model.layers.3.mlp.shared_experts.up_proj.weight", "whole"),
        ("model.layers.3.mlp.gate.weight", "whole"),
        ("model.layers.0.mlp.gate_proj.weight", "dense"),
        ("model.layers.0.self_attn.q_b_proj.weight", "heads"),
        ("model.layers.0.self_attn.kv_b_proj.weight", "heads"),
        ("model.layers.0.self_attn.q_a_proj.weight", "whole"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "whole"),
        ("model.layers.0.self_attn.indexer.wq_b.weight", "whole"),
        ("model.layers.0.self_attn.k_proj.weight", "kv"),
        ("model.layers.0.self_attn.o_proj.weight", "heads"),
        ("model.layers.61.shared_head.head.weight", "head"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.visual.blocks.0.attn.qkv.weight", "whole"),
    ],
)
def test_names_of_tensors_say_who_holds_them(name: str, part: str) -> None:
    """As checkpoints spell them."""
    assert part_of(name) == part


def small(config: Path) -> Any:
    """The configuration of a checkpoint on disk."""
    return SimpleNamespace(**json.loads((config / "config.json").read_text()))


def known(path: Path, dtype: str = "float32") -> Any:
    """Its weights."""
    return weights_of(str(path), small(path), {}, weight_format="unquantized", dtype=dtype)


def test_files_are_counted_to_the_byte(tmp_path: Path) -> None:
    """And the dimensions alone say the same but for norms."""
    path = write_checkpoint(tmp_path, Shape(num_hidden_layers=2))
    weights = known(path)
    size = (path / "model.safetensors").stat().st_size
    assert weights.source == "safetensors headers"
    assert size - 65536 < weights.checkpoint_bytes < size
    (path / "model.safetensors").unlink()
    planned = known(path)
    assert planned.source == "config.json"
    assert planned.checkpoint_bytes == pytest.approx(weights.checkpoint_bytes, rel=0.005)
    for part in ("experts", "heads", "kv", "embedding", "head"):
        assert planned.target[part] == weights.target[part], part


def test_floats_are_loaded_in_the_dtype_of_the_launch(tmp_path: Path) -> None:
    """A float32 checkpoint that is served in bf16 takes half."""
    path = write_checkpoint(tmp_path, Shape(num_hidden_layers=1))
    whole, half = known(path), known(path, "bfloat16")
    assert half.checkpoint_bytes == pytest.approx(whole.checkpoint_bytes / 2, rel=0.001)


def test_an_index_without_its_files_gives_the_total(tmp_path: Path) -> None:
    """Parts keep the proportions of the configuration."""
    path = write_checkpoint(tmp_path, Shape(num_hidden_layers=1))
    (path / "model.safetensors").unlink()
    planned = known(path)
    total = planned.checkpoint_bytes * 11 // 10
    index = {"metadata": {"total_size": total}, "weight_map": {"a": "model-1-of-2.safetensors"}}
    (path / INDEX).write_text(json.dumps(index))
    weights = known(path)
    assert weights.source == "safetensors index"
    assert weights.checkpoint_bytes == pytest.approx(total, rel=1e-4)
    assert weights.target["experts"] == pytest.approx(planned.target["experts"] * 1.1, rel=1e-3)


def test_what_is_quantised_after_loading_is_counted_as_it_is_loaded(tmp_path: Path) -> None:
    """By the files, or by their total: not by the dimensions, which may be off."""
    path = write_checkpoint(tmp_path, Shape(num_hidden_layers=2))
    online = {"weight_format": "fp8_tensor", "dtype": "bfloat16"}
    weights = weights_of(str(path), small(path), {}, **online)
    assert weights is not None
    assert weights.before == known(path, "bfloat16")
    (path / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 123_456_789}, "weight_map": {"a": "b.safetensors"}}
    (path / INDEX).write_text(json.dumps(index))
    weights = weights_of(str(path), small(path), {}, **online)
    assert weights is not None
    assert weights.before is not None
    assert weights.before.source == "safetensors index"
    assert weights.before.checkpoint_bytes == pytest.approx(123_456_789, rel=1e-4)


def test_nothing_is_read_from_a_hub_or_a_broken_file(tmp_path: Path) -> None:
    """Each node would see its own cache; an unfinished download is the loader's to report."""
    assert read_checkpoint("deepseek-ai/DeepSeek-V3", 2) == ((), 0)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 16)
    assert read_checkpoint(str(tmp_path), 2) == ((), 0)
