"""What a model weighs: its configuration's dimensions, and its checkpoint's files where they are
here."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ...planning.memory import DTYPE_BYTES
from ...planning.model_shape import ModelShape
from ...planning.weight_bytes import Weights, from_shape, from_tensors, scaled
from .int4_facts import INT4, has_zero_points
from .safetensors_files import read_checkpoint

_NOT_MODELLED = (
    "compress_ratios", "hybrid_override_pattern", "linear_attn_config", "mamba_d_state",
    "mamba_num_heads", "mamba_n_heads", "block_configs", "lightning_attn_config",
)  # fmt: skip
"""Attributes of models whose layers these dimensions do not describe."""
BY_INDEX = "safetensors index"
_SKIPPED = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules", "exclude")
_EXPERTS_ONLY = frozenset({"mxfp4", "modelopt_fp4", "nvfp4", "petit_nvfp4"})
"""Formats of experts alone, unless the checkpoint lists what it leaves out; then it says so."""
_ONE_BYTE = frozenset(
    {
        "compressed-tensors_fp8", "fbgemm_fp8", "fp8", "fp8_tensor", "modelopt", "modelopt_fp8",
        "w8a8_fp8", "w8a8_int8",
    }
)  # fmt: skip
_AFTER_LOADING = frozenset({"fp8_tensor", "mxfp8"})
"""Formats that weights without one are quantised to once they are all on the device: the host makes
them in the activation dtype (``Fp8LinearMethod``, ``Fp8MoEMethod``: ``create_weights``)."""
_PACKED = frozenset(
    {"awq", "awq_marlin", "gptq", "gptq_marlin", "moe_wna16", "compressed-tensors", "auto-round"}
)


def weights_of(path: str, text: Any, quantization: dict[str, Any], **launch: Any) -> Weights | None:
    """Weights of a model; None where its configuration does not say enough.

    Args:
        path: ``--model-path``.
        text: the text model's Hugging Face configuration.
        quantization: the checkpoint's ``quantization_config``, or empty.
        **launch: ``weight_format`` and ``dtype`` as the launch loads them, ``vision`` the
            configuration of a tower beside the text model.
    """
    shape = shape_of(text, quantization, **launch)
    if shape is None:
        return None
    weights = weights_of_shape(path, shape, quantization, weight_format=launch["weight_format"])
    if not quantization and launch["weight_format"] in _AFTER_LOADING:
        plain = {**launch, "weight_format": "unquantized"}
        return replace(weights, before=weights_of(path, text, {}, **plain))
    return weights


def weights_of_shape(
    path: str, shape: ModelShape, quantization: dict[str, Any], *, weight_format: str
) -> Weights:
    """Weights of a model of known dimensions: by its files as far as they are here."""
    online = not quantization and weight_format != "unquantized"
    found = read_checkpoint(path, shape.dtype_bytes)
    if found.tensors and not online:
        tensors = found.tensors
        if weight_format.endswith(INT4):
            zeros = 4 if has_zero_points(quantization) else 0
            tensors = tuple(
                (name, size * (zeros if _is_zero(name) else 1)) for name, size in tensors
            )
        return from_tensors(tensors, shape)
    weights = from_shape(shape)
    return scaled(weights, found.total, BY_INDEX) if found.total and not online else weights


def shape_of(
    text: Any,
    quantization: dict[str, Any],
    *,
    weight_format: str,
    dtype: str,
    vision: Any = None,
    dense: bool = False,
) -> ModelShape | None:
    """Dimensions of a text configuration; None where it has not what we know how to read, or no
    routed experts, unless the model is said to be ``dense``."""

    def number(*names: str, default: int = 0) -> int:
        for name in names:
            value = getattr(text, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return default

    layers, hidden = number("num_hidden_layers", "n_layers"), number("hidden_size")
    heads, vocabulary = number("num_attention_heads"), number("vocab_size")
    experts = number("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
    intermediate = number("moe_intermediate_size", "moe_hidden_size", "intermediate_size")
    dtype_bytes = DTYPE_BYTES.get(dtype, 2)
    widths = bytes_per_weight(weight_format, quantization, dtype_bytes)
    per_layer = [getattr(text, name, None) for name in ("num_attention_heads", "intermediate_size")]
    if (
        not all((layers, hidden, heads, vocabulary, experts or dense, intermediate))
        or widths is None
        or any(isinstance(value, (list, tuple)) for value in per_layer)
        or any(getattr(text, name, None) for name in _NOT_MODELLED)
    ):
        return None
    kv_lora = number("kv_lora_rank")
    nope, rope = number("qk_nope_head_dim"), number("qk_rope_head_dim")
    head_dim = nope + rope if kv_lora else number("head_dim", default=hidden // heads)
    shared = number("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
    shared = shared or number("n_shared_experts", "num_shared_experts") * intermediate
    linear_layers, linear_width = _linear_attention(text, layers, hidden)
    return ModelShape(
        layers=layers,
        hidden=hidden,
        vocabulary=vocabulary,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_dim=head_dim,
        v_head_dim=number("v_head_dim", default=head_dim) or head_dim,
        gated_queries=bool(getattr(text, "attn_output_gate", linear_layers)),
        kv_lora=kv_lora,
        q_lora=number("q_lora_rank"),
        rope_dim=rope,
        nope_dim=nope,
        index_heads=number("index_n_heads"),
        index_dim=number("index_head_dim"),
        linear_layers=linear_layers,
        linear_width=linear_width,
        dense_layers=dense_layers(text, layers) if experts else layers,
        dense_intermediate=number("intermediate_size", "ffn_hidden_size"),
        experts=experts,
        expert_hidden=number("routed_expert_hidden_size", default=hidden),
        expert_intermediate=intermediate,
        shared_intermediate=shared,
        draft_layers=number("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers"),
        expert_bytes=widths[0],
        attention_bytes=widths[1],
        dense_bytes=widths[2],
        dtype_bytes=dtype_bytes,
        tower_parameters=_tower(vision),
    )


def dense_layers(text: Any, layers: int) -> int:
    """Layers without routed experts, as the models read their configurations."""
    first = getattr(text, "first_k_dense_replace", None)
    frequency = getattr(text, "moe_layer_freq", None)
    if isinstance(frequency, (list, tuple)):
        return sum(not moe for moe in frequency[:layers])
    if isinstance(first, int):
        every = frequency if isinstance(frequency, int) and frequency > 0 else 1
        return sum(index < first or index % every != 0 for index in range(layers))
    enumerated = getattr(text, "moe_layers_enum", None)
    if enumerated:
        found = enumerated.split(",") if isinstance(enumerated, str) else enumerated
        return layers - len(set(map(int, found)))
    only = set(getattr(text, "mlp_only_layers", None) or ())
    step = getattr(text, "decoder_sparse_step", None) or 1
    return sum(index in only or (index + 1) % step != 0 for index in range(layers))


def bytes_per_weight(
    weight_format: str, quantization: dict[str, Any], dtype_bytes: int
) -> tuple[float, float, float] | None:
    """(experts, attention, dense and shared MLPs), scales included; None for unknown formats."""
    whole = float(dtype_bytes)
    if weight_format.startswith("humming"):  # it repacks what the checkpoint holds
        weight_format = _of_checkpoint(weight_format, quantization)
    if weight_format == "unquantized":
        return whole, whole, whole
    expert = _expert_bytes(weight_format, quantization)
    if expert is None:
        return None
    rest = 1.0 if weight_format in ("w4afp8", "fp8_fp4") else expert
    attention = whole if _leaves_out(quantization, "attn") else rest
    dense = whole if _leaves_out(quantization, "mlp|shared_expert") else rest
    listed = any(quantization.get(name) for name in _SKIPPED)
    if weight_format == "mxfp4" or (weight_format in _EXPERTS_ONLY and not listed):
        attention = whole
    return expert, attention, dense


def _of_checkpoint(weight_format: str, quantization: dict[str, Any]) -> str:
    """The format that a checkpoint's own description names."""
    method = str(quantization.get("quant_method"))
    if weight_format == "humming_fp4":
        return "fp8_fp4" if method == "fp8" else "mxfp4"
    if method == "modelopt" and "FP4" in str(quantization.get("quant_algo")):
        return "modelopt_fp4"
    return "fp8_block" if quantization.get("weight_block_size") else method


def _expert_bytes(name: str, quantization: dict[str, Any]) -> float | None:
    if name.startswith("fp8_block"):
        rows, columns = quantization.get("weight_block_size") or (128, 128)
        return 1 + 4 / (rows * columns)
    if name in _ONE_BYTE:
        return 1.0
    fixed = {"mxfp8": 1 + 1 / 32, "mxfp4": 0.5 + 1 / 32, "fp8_fp4": 0.5 + 1 / 32}
    fixed |= dict.fromkeys(("modelopt_fp4", "nvfp4", "petit_nvfp4"), 0.5 + 1 / 16)
    fixed["w4afp8"] = 0.5 + 2 / 128
    if name in fixed:
        return fixed[name]
    if name.removesuffix(INT4) not in _PACKED:
        return None
    given = quantization
    for group in (quantization.get("config_groups") or {}).values():
        given = (group or {}).get("weights") or {}
        break
    bits = given.get("num_bits") or given.get("bits") or given.get("w_bit") or 4
    group_size = given.get("group_size") or given.get("q_group_size") or 0
    each = 4 if name.endswith(INT4) and has_zero_points(quantization) else 2
    return float(bits) / 8 + (each / group_size if group_size > 0 else 0.0)


def _is_zero(name: str) -> bool:
    """Whether a tensor holds the experts' zero points: four bits in a checkpoint, two bytes as our
    kernels read them, and dropped where they are all the same."""
    return ".experts." in name and name.endswith((".qzeros", ".weight_zero_point"))


def _leaves_out(quantization: dict[str, Any], words: str) -> bool:
    """Whether a checkpoint's own list leaves a part unquantised: in general, or layer by layer."""
    entries = [str(e) for name in _SKIPPED for e in quantization.get(name) or ()]
    matching = [entry for entry in entries if re.search(words, entry) and "mlp.gate" not in entry]
    matching = [entry for entry in matching if ".experts." not in entry]
    layers = {found[1] for entry in matching if (found := re.search(r"layers\.(\d+)", entry))}
    general = [entry for entry in matching if not re.search(r"layers\.\d", entry)]
    return bool(general) or len(layers) > 8


def _linear_attention(text: Any, layers: int, hidden: int) -> tuple[int, int]:
    """(layers, parameters of one) with gated linear attention, as in Qwen3-Next; (0, 0) without."""
    parts = (
        getattr(text, "linear_num_key_heads", 0),
        getattr(text, "linear_key_head_dim", 0),
        getattr(text, "linear_num_value_heads", 0),
        getattr(text, "linear_value_head_dim", 0),
    )
    if not all(isinstance(part, int) and part > 0 for part in parts):
        return 0, 0
    keys, values = parts[0] * parts[1], parts[2] * parts[3]
    types = getattr(text, "layer_types", None)
    interval = getattr(text, "full_attention_interval", None) or 4
    count = (
        sum(kind == "linear_attention" for kind in types) if types else layers - layers // interval
    )
    return count, hidden * (2 * keys + 2 * values + 2 * parts[2]) + values * hidden


def _tower(vision: Any) -> int:
    """Parameters of a vision tower, roughly: its blocks."""
    if vision is None:
        return 0

    def number(*names: str) -> int:
        found = (
            vision.get(n) if isinstance(vision, dict) else getattr(vision, n, 0) for n in names
        )
        return next((int(value) for value in found if isinstance(value, int) and value), 0)

    width = number("hidden_size", "vt_hidden_size", "embed_dim")
    inner = number("intermediate_size", "vt_intermediate_size") or 4 * width
    return number("num_hidden_layers", "depth", "vt_num_hidden_layers") * (
        4 * width * width + 3 * width * inner
    )
