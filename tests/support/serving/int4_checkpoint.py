"""A checkpoint's experts in int4, as compressed-tensors stores them, and what they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moe_plugin.kernels.formats import Format
from moe_plugin.kernels.packing import MIDDLE

from ..kernel_cases import quantise_codes
from .checkpoint import write_tokenizer

_PROJECTIONS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def write_int4(model: Path, folder: Path, fmt: Format, device: str = "cpu") -> tuple[Path, Path]:
    """Two checkpoints below ``folder``: ``model`` with packed experts, and with the weights that
    these stand for, rounded to bf16 after their scale as kernels round them. ``device``: where
    they are rounded; ``fmt`` has no zero points."""
    packed, plain = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if ".experts." not in name or not name.endswith(_PROJECTIONS):
            packed[name] = plain[name] = tensor
            continue
        found = quantise_codes(tensor[None].to(device), fmt)
        codes, scale = found[0][0], found[1][0]
        packed[f"{name}_packed"] = _words(codes).cpu()
        packed[f"{name}_scale"] = scale.cpu()
        packed[f"{name}_shape"] = torch.tensor(tensor.shape)
        weight = (codes.int() - MIDDLE) * scale.float().repeat_interleave(fmt.group_size, -1)
        plain[name] = weight.bfloat16().to(tensor.dtype).cpu()
    config = json.loads((model / "config.json").read_text())
    return (
        _write(folder / "packed", config | {"quantization_config": quantization(fmt)}, packed),
        _write(folder / "plain", config, plain),
    )


def quantization(fmt: Format) -> dict[str, object]:
    """``quantization_config`` as Kimi-K2-Thinking has it: experts alone."""
    weights = {
        "num_bits": fmt.weight_bits, "type": "int", "strategy": "group",
        "group_size": fmt.group_size, "symmetric": True, "dynamic": False, "actorder": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def _words(codes: torch.Tensor) -> torch.Tensor:
    """[N, K] codes, eight neighbours to an int32, the first lowest."""
    eights = codes.to(torch.int64).unflatten(-1, (-1, 8))
    packed = (eights << torch.arange(0, 32, 4, device=codes.device)).sum(-1)
    return (packed - ((packed >> 31) << 32)).to(torch.int32)


def _write(folder: Path, config: dict[str, object], weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    save_file({name: each.contiguous() for name, each in weights.items()},
              folder / "model.safetensors")  # fmt: skip
    vocabulary, longest = config["vocab_size"], config["max_position_embeddings"]
    assert isinstance(vocabulary, int)
    assert isinstance(longest, int)
    write_tokenizer(folder, vocabulary, longest)
    return folder
