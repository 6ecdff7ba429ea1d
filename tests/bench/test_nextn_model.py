"""The serving benchmark's DeepSeek-V3 shape with a NextN layer, in small."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

sys.path += [
    str(Path(__file__).parents[2] / "benchmarks" / "serving"),
    str(Path(__file__).parents[1] / "support"),
]
import models


def test_a_nextn_layer_is_the_last_file_and_passes_its_input_on(tmp_path: Path) -> None:
    """Its projection keeps the embedding, which a draft that was never trained can use."""
    shape = models.DeepSeekShape(
        num_hidden_layers=1,
        hidden_size=128,
        intermediate_size=128,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_attention_heads=2,
        q_lora_rank=128,
        kv_lora_rank=64,
        first_k_dense_replace=0,
        num_nextn_predict_layers=1,
    )
    models.write_deepseek(tmp_path, shape, "cpu")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.eh_proj.weight"
    assert {"model.layers.1.enorm.weight", "model.layers.1.mlp.experts.7.up_proj.weight"} <= set(
        index
    )
    with safe_open(tmp_path / index[name], "pt") as file:
        projection = file.get_tensor(name).float()
    assert projection.shape == (128, 256)
    assert torch.allclose(projection.diagonal(), torch.tensor(models.ECHO), atol=0.5)
    assert projection[:, 128:].abs().max() < 1
