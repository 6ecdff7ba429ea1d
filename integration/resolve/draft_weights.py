"""What a draft from another checkpoint weighs: the layers that the host loads of it, without what
it shares with the target."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...planning.model_shape import ModelShape
from ...planning.weight_bytes import PARTS, Weights, from_shape
from .draft_facts import draft_config
from .model_facts import quantization_config, refined_format, routed_experts
from .weight_facts import BY_INDEX, shape_of, weights_of_shape

SHARING = frozenset({"EAGLE", "NEXTN"})
"""Algorithms that put the target's embedding and head in the place of the draft's own
(``EagleDraftWorker.init_lm_head``)."""
DIVIDED = SHARING | {"STANDALONE"}
"""Algorithms whose drafts are divided over ranks as the target is. Those of the others run within
one DP group (``legacy_draft_parallel_spec``), often whole on every rank."""


def draft_weights(server_args: Any, cfg: Any, dtype: str) -> Weights | None:
    """Weights of the draft; None where it is not divided as the target is, or not understood."""
    algorithm = str(cfg.speculative_algorithm).upper()
    if algorithm not in DIVIDED:
        return None
    try:
        config, model = draft_config(server_args, cfg), _draft_model(server_args, cfg)
    except Exception:  # not readable here: the host will say so with its own message
        return None
    path, text = cfg.speculative_draft_model_path, getattr(config, "text_config", config)
    quantization = quantization_config(model)
    kind = refined_format(getattr(model, "quantization", None), model)
    dense = routed_experts(text) == 0
    shape = shape_of(text, quantization, weight_format=kind, dtype=dtype, dense=dense)
    if shape is None:
        return None
    loaded, stored = str((model.hf_config.architectures or [""])[0]), _architecture(path)
    # The host gives a whole checkpoint the class of its draft's layers, and loads these alone
    # (``ModelConfig._config_draft_model``). What has such a class by itself holds nothing else.
    if loaded.endswith("NextN") or (loaded.endswith("MTP") and loaded != stored):
        shape = replace(shape, draft_layers=max(1, shape.draft_layers))
        weights = _draft_layers(path, shape, quantization, kind, whole=loaded != stored)
    elif algorithm in SHARING:  # layers over the target's hidden states, however many there are
        shape = replace(shape, draft_layers=shape.layers)
        weights = _draft_layers(path, shape, quantization, kind, whole=False)
    else:
        weights = weights_of_shape(path, shape, quantization, weight_format=kind)
        weights = replace(weights, draft={})
    if algorithm in SHARING:
        weights = replace(weights, target={**weights.target, "embedding": 0, "head": 0})
    return weights


def _draft_layers(
    path: str, shape: ModelShape, quantization: dict[str, Any], kind: str, *, whole: bool
) -> Weights:
    """Draft layers with embedding and head: of a ``whole`` model, or of a checkpoint that holds
    nothing else."""
    alone = replace(shape, layers=0, dense_layers=0, linear_layers=0)
    weights = weights_of_shape(path, shape if whole else alone, quantization, weight_format=kind)
    planned = from_shape(alone)
    # Its total says nothing about the layers where embedding and head are left out.
    fewer = weights.checkpoint_bytes < planned.checkpoint_bytes
    if not whole and fewer and weights.source == BY_INDEX:
        weights = planned
    ends = {part: weights.target[part] for part in ("embedding", "head")}
    if whole:
        draft = dict(weights.draft or from_shape(shape).draft)
    else:
        draft = {part: weights.target[part] + weights.draft.get(part, 0) for part in PARTS}
    return replace(
        weights,
        shape=alone,
        target={**dict.fromkeys(PARTS, 0), **ends},
        draft={**draft, **dict.fromkeys(ends, 0)},
    )


def _draft_model(server_args: Any, cfg: Any) -> Any:
    """The host's ``ModelConfig`` of the draft, as its worker makes it."""
    from sglang.srt.configs.model_config import ModelConfig

    return ModelConfig.from_server_args(
        server_args,
        model_path=cfg.speculative_draft_model_path,
        model_revision=cfg.speculative_draft_model_revision,
        is_draft_model=True,
    )


def _architecture(path: str) -> str:
    """Class name in a local checkpoint; empty where there is none."""
    try:
        config = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
        return str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return ""
