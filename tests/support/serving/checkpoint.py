"""A small random Qwen3-MoE checkpoint with a byte-level tokenizer, written without a network.

Expert weights are scaled up: with default initialisation the experts hardly move the logits, and
a test that compares tokens would pass with the experts left out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EXPERT_GAIN = 4.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Model dimensions, by their names in Hugging Face's Qwen3MoeConfig."""

    num_hidden_layers: int = 4
    hidden_size: int = 256
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    vocab_size: int = 260
    max_position_embeddings: int = 4096


# Eight of Qwen3-30B-A3B's layers, with a byte vocabulary: what the GPU benchmark serves.
QWEN3_30B_LAYERS = Shape(
    num_hidden_layers=8,
    hidden_size=2048,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    max_position_embeddings=8192,
)


def write_checkpoint(
    path: Path,
    shape: Shape | None = None,
    *,
    seed: int = 0,
    drop_experts: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Path:
    """Write config, weights and tokenizer below ``path``; returns it.

    Args:
        path: a directory; created.
        shape: model dimensions.
        seed: everything else about the weights.
        drop_experts: experts whose output is zeroed in every layer, for sensitivity tests.
        dtype: of the stored weights.
        device: where random numbers are drawn; large shapes take minutes on a CPU.
    """
    shape = shape or Shape()
    write_config(path, shape, str(dtype).removeprefix("torch."))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    save_file(_weights(shape, seed, drop_experts, dtype, device), path / "model.safetensors")
    write_tokenizer(path, shape.vocab_size, shape.max_position_embeddings)
    return path


def write_config(path: Path, shape: Shape, dtype: str) -> Path:
    """Write config.json alone, which is all that planning needs; returns ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "intermediate_size": 4 * shape.hidden_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "use_cache": True,
        **asdict(shape),
    }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def _weights(
    shape: Shape, seed: int, drop_experts: tuple[int, ...], dtype: torch.dtype, device: str
) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    hidden, inter = shape.hidden_size, shape.moe_intermediate_size

    def random(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device)
        return (values * gain / columns**0.5).to(dtype).cpu()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=dtype)

    weights = {
        "model.embed_tokens.weight": random(shape.vocab_size, hidden, hidden**0.5),
        "model.norm.weight": ones(hidden),
        "lm_head.weight": random(shape.vocab_size, hidden, 2.0),
    }
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    for index in range(shape.num_hidden_layers):
        layer = f"model.layers.{index}."
        weights |= {
            layer + "input_layernorm.weight": ones(hidden),
            layer + "post_attention_layernorm.weight": ones(hidden),
            layer + "self_attn.q_norm.weight": ones(shape.head_dim),
            layer + "self_attn.k_norm.weight": ones(shape.head_dim),
            layer + "self_attn.q_proj.weight": random(heads * shape.head_dim, hidden),
            layer + "self_attn.k_proj.weight": random(kv_heads * shape.head_dim, hidden),
            layer + "self_attn.v_proj.weight": random(kv_heads * shape.head_dim, hidden),
            layer + "self_attn.o_proj.weight": random(hidden, heads * shape.head_dim),
            layer + "mlp.gate.weight": random(shape.num_experts, hidden),
        }
        for expert in range(shape.num_experts):
            name = f"{layer}mlp.experts.{expert}."
            gate, up = random(inter, hidden), random(inter, hidden)
            down = random(hidden, inter, EXPERT_GAIN)
            weights[name + "gate_proj.weight"] = gate
            weights[name + "up_proj.weight"] = up
            weights[name + "down_proj.weight"] = down * (expert not in drop_experts)
    return weights


def byte_tokenizer() -> Tokenizer:
    """One token per byte, in the order of their characters, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(alphabet)}
    for special in ("<bos>", "<eos>", "<pad>"):
        vocab[special] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_tokenizer(path: Path, vocab_size: int, max_length: int) -> None:
    """The tokenizer's files beside the weights."""
    tokenizer = byte_tokenizer()
    assert tokenizer.get_vocab_size() <= vocab_size
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=max_length,
    ).save_pretrained(path)
