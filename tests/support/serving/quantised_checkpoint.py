"""A checkpoint's experts as compressed-tensors stores int4 or FP8, and what they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moe_plugin.kernels.formats import Format
from moe_plugin.kernels.packing import MIDDLE

from ..kernel_cases import quantise_channels, quantise_codes
from .checkpoint import write_tokenizer

_PROJECTIONS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def write_quantised(
    model: Path, folder: Path, fmt: Format, device: str = "cpu"
) -> tuple[Path, Path]:
    """Two checkpoints below ``folder``: ``model`` with quantised experts, and with the weights that
    these stand for, rounded to bf16 after their scale as kernels round them. ``device``: where
    they are rounded; ``fmt`` is FP8 per channel, or int4 without zero points."""
    quantised, plain = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if ".experts." not in name or not name.endswith(_PROJECTIONS):
            quantised[name] = plain[name] = tensor
            continue
        stored, weight = (_int4 if fmt.packed else _fp8)(name, tensor.to(device), fmt)
        quantised |= {key: each.cpu() for key, each in stored.items()}
        plain[name] = weight.bfloat16().to(tensor.dtype).cpu()
    config = json.loads((model / "config.json").read_text())
    return (
        _write(folder / "packed", config | {"quantization_config": quantization(fmt)}, quantised),
        _write(folder / "plain", config, plain),
    )


def _int4(
    name: str, weight: torch.Tensor, fmt: Format
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    found = quantise_codes(weight[None], fmt)
    codes, scale = found[0][0], found[1][0]
    stored = {
        f"{name}_packed": _words(codes),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(weight.shape),
    }
    return stored, (codes.int() - MIDDLE) * scale.float().repeat_interleave(fmt.group_size, -1)


def _fp8(
    name: str, weight: torch.Tensor, _fmt: Format
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    values, scale = (each[0] for each in quantise_channels(weight[None]))
    stored = {name: values, f"{name}_scale": scale.unsqueeze(-1)}
    return stored, values.float() * scale.unsqueeze(-1)


def quantization(fmt: Format) -> dict[str, object]:
    """``quantization_config`` of the experts alone: Kimi-K2-Thinking's, or GLM-4.6-FP8's."""
    common = {"num_bits": fmt.weight_bits, "symmetric": True, "actorder": None}
    weights = {**common, "type": "float", "strategy": "channel", "dynamic": False}
    rows: dict[str, object] | None = {
        **common, "type": "float", "strategy": "token", "dynamic": True
    }  # fmt: skip
    if fmt.packed:
        weights |= {"type": "int", "strategy": "group", "group_size": fmt.group_size}
        rows = None
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if fmt.packed else "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": rows,
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
