"""The models that are served: real shapes with few layers, random weights, a byte vocabulary.

Ten gigabytes are written in seconds: weights are drawn on the GPU, one tensor for all experts of a
layer, and each layer is one file, written by its own thread.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from serving.checkpoint import (
    EXPERT_GAIN,
    QWEN3_30B_LAYERS,
    Shape,
    write_config,
    write_tokenizer,
)

BLOCK = 128
CONTEXT = 40960  # as Qwen3-30B-A3B has it
OTHER_SEED = 1000
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
_FP8_STD = 64.0  # of 448: seven sigma fit
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True)
class DeepSeekShape:
    """DeepSeek-V3's dimensions; experts fewer, so that a few layers fit one GPU."""

    num_hidden_layers: int = 4
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 64
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    vocab_size: int = 260
    max_position_embeddings: int = CONTEXT
    num_nextn_predict_layers: int = 0


ROUTER_GAIN = 4.0
"""Of Qwen3's router, whose weights are a softmax: the last of the chosen experts then weighs
little, and so does rounding, which decides about it. Who is chosen is as without."""
ECHO = 8.0
"""Of a model with a NextN layer: how much larger embeddings are than what a layer adds to them. So
the next token follows mostly from the last one, for target and draft alike, and a draft that was
never trained is accepted now and then."""


@dataclass(frozen=True)
class Block:
    """Equal tensors by name, drawn together: ``gain`` over the square root of the columns."""

    names: Sequence[str]
    shape: tuple[int, ...]
    gain: float | None = 1.0
    """None: ones, such as norms."""
    fp8: bool = False
    dtype: torch.dtype = torch.bfloat16
    identity: float = 0.0
    """Added along the diagonal."""


def write_model(name: str, folder: Path, device: str) -> Path:
    """Write a model by its name on the command line, unless it is there; returns its folder.

    ``qwen3-bf16`` or ``qwen3-fp8`` with eight layers, ``qwen3-bf16-16`` with sixteen, and
    ``qwen3-bf16-16-other`` with other weights;
    ``deepseek-v3`` with four, ``deepseek-v3-6`` with six, the first of them dense;
    ``deepseek-v3-nextn`` with three, 32 experts and a NextN layer. On device ``meta`` files have
    headers and sizes, but nothing in them.
    """
    if (folder / "written").exists():
        return folder
    if found := re.fullmatch(r"qwen3-(bf16|fp8)(?:-(\d+))?(-other)?", name):
        layers = int(found[2] or QWEN3_30B_LAYERS.num_hidden_layers)
        shape = replace(QWEN3_30B_LAYERS, num_hidden_layers=layers, max_position_embeddings=CONTEXT)
        seed = OTHER_SEED if found[3] else 0
        write_qwen3(folder, shape, device, fp8=found[1] == "fp8", seed=seed)
    elif name == "deepseek-v3-nextn":
        shape = DeepSeekShape(num_hidden_layers=3, n_routed_experts=32, num_nextn_predict_layers=1)
        write_deepseek(folder, shape, device)
    elif found := re.fullmatch(r"deepseek-v3(?:-(\d+))?", name):
        layers = int(found[1] or DeepSeekShape().num_hidden_layers)
        write_deepseek(folder, DeepSeekShape(num_hidden_layers=layers), device)
    else:
        raise ValueError(f"unknown model {name!r}")
    (folder / "written").touch()
    return folder


def write_qwen3(folder: Path, shape: Shape, device: str, *, fp8: bool, seed: int = 0) -> None:
    """A Qwen3-MoE checkpoint."""
    write_config(folder, shape, "bfloat16")
    if fp8:
        _add_to_config(folder, {"quantization_config": FP8})
    _write(folder, [list(layer) for layer in qwen3_shards(shape, fp8=fp8)], device, seed)
    write_tokenizer(folder, shape.vocab_size, shape.max_position_embeddings)


def write_deepseek(folder: Path, shape: DeepSeekShape, device: str) -> None:
    """A DeepSeek-V3 checkpoint, FP8 as published."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(deepseek_config(shape), indent=2))
    _write(folder, [list(layer) for layer in deepseek_shards(shape)], device)
    write_tokenizer(folder, shape.vocab_size, shape.max_position_embeddings)


def qwen3_shards(shape: Shape, *, fp8: bool) -> Iterator[Iterator[Block]]:
    """Tensors of each file."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    kv = shape.num_key_value_heads * shape.head_dim
    yield _ends(shape.vocab_size, hidden)
    for index in range(shape.num_hidden_layers):
        layer = f"model.layers.{index}."

        def tensors(layer: str = layer) -> Iterator[Block]:
            attention = layer + "self_attn."
            yield from _norms(layer, hidden)
            names = [attention + name for name in ("q_norm.weight", "k_norm.weight")]
            yield Block(names, (shape.head_dim,), None)
            yield Block([attention + "q_proj.weight"], (heads, hidden), 1.0, fp8)
            names = [attention + name for name in ("k_proj.weight", "v_proj.weight")]
            yield Block(names, (kv, hidden), 1.0, fp8)
            yield Block([attention + "o_proj.weight"], (hidden, heads), 1.0, fp8)
            yield Block([layer + "mlp.gate.weight"], (shape.num_experts, hidden), ROUTER_GAIN)
            experts = layer + "mlp.experts."
            yield from _experts(
                experts, shape.num_experts, hidden, shape.moe_intermediate_size, fp8=fp8
            )

        yield tensors()


def deepseek_shards(shape: DeepSeekShape) -> Iterator[Iterator[Block]]:
    """Tensors of each file; the last one is the NextN layer's where there is one."""
    drafts = shape.num_nextn_predict_layers
    yield _ends(shape.vocab_size, shape.hidden_size, ECHO if drafts else 1.0)
    for index in range(shape.num_hidden_layers):
        yield _deepseek_layer(shape, index)
    if drafts:
        yield _nextn_layer(shape)


def _deepseek_layer(shape: DeepSeekShape, index: int) -> Iterator[Block]:
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    query = shape.qk_nope_head_dim + shape.qk_rope_head_dim
    key_value = shape.qk_nope_head_dim + shape.v_head_dim
    layer = f"model.layers.{index}."
    attention = layer + "self_attn."
    yield from _norms(layer, hidden)
    yield Block([attention + "q_a_layernorm.weight"], (shape.q_lora_rank,), None)
    yield Block([attention + "kv_a_layernorm.weight"], (shape.kv_lora_rank,), None)
    for name, rows, columns in (
        ("q_a_proj", shape.q_lora_rank, hidden),
        ("q_b_proj", heads * query, shape.q_lora_rank),
        ("kv_a_proj_with_mqa", shape.kv_lora_rank + shape.qk_rope_head_dim, hidden),
        ("kv_b_proj", heads * key_value, shape.kv_lora_rank),
        ("o_proj", hidden, heads * shape.v_head_dim),
    ):
        yield Block([f"{attention}{name}.weight"], (rows, columns), 1.0, True)
    if index < shape.first_k_dense_replace:
        yield from _experts(layer + "mlp.", None, hidden, shape.intermediate_size, fp8=True)
        return
    inter, count = shape.moe_intermediate_size, shape.n_routed_experts
    yield Block([layer + "mlp.gate.weight"], (count, hidden))
    bias = layer + "mlp.gate.e_score_correction_bias"
    yield Block([bias], (count,), 0.01, dtype=torch.float32)
    shared = inter * shape.n_shared_experts
    yield from _experts(layer + "mlp.shared_experts.", None, hidden, shared, fp8=True)
    yield from _experts(layer + "mlp.experts.", count, hidden, inter, fp8=True)


def _nextn_layer(shape: DeepSeekShape) -> Iterator[Block]:
    """The layer past the last, with what joins it to the target; head and embeddings are shared."""
    hidden, layer = shape.hidden_size, f"model.layers.{shape.num_hidden_layers}."
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield Block([f"{layer}{name}.weight"], (hidden,), None)
    yield Block([layer + "eh_proj.weight"], (hidden, 2 * hidden), 0.5, identity=ECHO)
    yield from _deepseek_layer(shape, shape.num_hidden_layers)


def deepseek_config(shape: DeepSeekShape) -> dict[str, Any]:
    """config.json as DeepSeek-V3 publishes it, in our dimensions."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "ep_size": 1,
        "initializer_range": 0.02,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "num_key_value_heads": shape.num_attention_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "tie_word_embeddings": False,
        "use_cache": True,
        "quantization_config": FP8,
        **asdict(shape),
    }


def _ends(vocabulary: int, hidden: int, echo: float = 1.0) -> Iterator[Block]:
    yield Block(["model.embed_tokens.weight"], (vocabulary, hidden), echo * hidden**0.5)
    yield Block(["model.norm.weight"], (hidden,), None)
    yield Block(["lm_head.weight"], (vocabulary, hidden), 2.0)


def _norms(layer: str, hidden: int) -> Iterator[Block]:
    names = ("input_layernorm.weight", "post_attention_layernorm.weight")
    yield Block([layer + name for name in names], (hidden,), None)


def _experts(
    prefix: str, count: int | None, hidden: int, inter: int, *, fp8: bool
) -> Iterator[Block]:
    """``count`` experts, or one MLP; the scaled-up output is what lets the experts matter."""
    numbers = [""] if count is None else [f"{index}." for index in range(count)]
    wide = [f"{prefix}{n}{name}.weight" for n in numbers for name in ("gate_proj", "up_proj")]
    yield Block(wide, (inter, hidden), 1.0, fp8)
    gain = 1.0 if count is None else EXPERT_GAIN
    yield Block([f"{prefix}{n}down_proj.weight" for n in numbers], (hidden, inter), gain, fp8)


def draw(
    block: Block, generator: torch.Generator | None, device: str
) -> Iterator[tuple[Sequence[str], torch.Tensor]]:
    """Tensors of a block, one per name along the first axis, and their scales where FP8."""
    count = len(block.names)
    size = (count, *block.shape)
    if block.gain is None:
        yield block.names, torch.ones(size, dtype=block.dtype, device=device)
        return
    gain = block.gain / math.sqrt(block.shape[-1]) if len(block.shape) > 1 else block.gain
    if not block.fp8:
        values = torch.randn(size, generator=generator, device=device, dtype=block.dtype)
        values.mul_(gain)
        if block.identity:
            values.diagonal(dim1=-2, dim2=-1).add_(block.identity)
        yield block.names, values
        return
    weights = torch.empty(size, dtype=torch.float8_e4m3fn, device=device)
    for one in () if device == "meta" else weights:  # one at a time: float32 in between
        values = torch.randn(block.shape, generator=generator, device=device)
        one.copy_((values * _FP8_STD).clamp_(-448, 448))
    yield block.names, weights
    blocks = [-(-length // BLOCK) for length in block.shape]
    scales = torch.rand((count, *blocks), generator=generator, device=device)
    # Scales that differ, or a kernel that mixes them up would pass.
    scales = (0.5 + scales) * gain / _FP8_STD
    yield [name + "_scale_inv" for name in block.names], scales


def _write(folder: Path, shards: Sequence[Sequence[Block]], device: str, seed: int = 0) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(4) as pool:  # each holds one layer on the GPU
        jobs = []
        for index, blocks in enumerate(shards):
            path = folder / f"model-{index:05}-of-{len(shards):05}.safetensors"
            jobs.append((path, pool.submit(_write_shard, path, blocks, seed + index, device)))
        for path, job in jobs:
            weight_map |= dict.fromkeys(job.result(), path.name)
    index_file = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def _write_shard(path: Path, blocks: Sequence[Block], seed: int, device: str) -> list[str]:
    """One safetensors file: header length, header, bytes; equal tensors lie side by side."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    header: dict[str, Any] = {}
    parts, offset = [], 0
    for block in blocks:
        for names, values in draw(block, generator, device):
            size = values[0].numel() * values.element_size()
            for name in names:
                header[name] = {
                    "dtype": _NAMES[values.dtype],
                    "shape": list(values.shape[1:]),
                    "data_offsets": [offset, offset + size],
                }
                offset += size
            if device != "meta":
                parts.append(values.cpu().view(torch.uint8))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in parts:
            file.write(values.numpy().data)
        file.truncate(8 + len(text) + offset)
    return list(header)


def _add_to_config(folder: Path, more: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more, indent=2))


if __name__ == "__main__":
    import sys

    write_model(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
