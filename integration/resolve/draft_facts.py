"""Rows per request under speculative decoding, known before the host has resolved them."""

from __future__ import annotations

import json
import os
from typing import Any

from ...planning.plan import Rejection, refusal
from .model_facts import has_routed_moe, routed_experts

# The host's defaults, where the user named nothing: `_auto_choose_speculative_params`,
# `_handle_ngram`, `_handle_dflash`.
EAGLE_DEFAULT = (3, 1, 4)
WIDE_EAGLE_DEFAULT = (5, 4, 8)
WIDE_EAGLE_ARCHITECTURES = ("LlamaForCausalLM", "Grok1ForCausalLM", "Grok1VForCausalLM")
NGRAM_DEFAULT = 12
DFLASH_DEFAULT = 16


WIDTH_FLAGS = {
    "NGRAM": "--speculative-num-draft-tokens",
    "DFLASH": "--speculative-dflash-block-size",
    "DSPARK": "--speculative-dspark-block-size",
}
"""The flag that the width follows from; ``--speculative-num-steps`` for all others."""


def draft_width(server_args: Any, cfg: Any) -> int:
    """Rows per running request in the widest decode-like forward of target or draft.

    The largest of: tokens verified per request, tokens the draft extends over after a verify
    (steps + 1), and draft branches (top-k).

    Raises:
        ConfigError: there would be none, as with a negative number of steps.
    """
    algorithm = (cfg.speculative_algorithm or "").upper()
    if not algorithm or algorithm == "NONE":
        return 1
    width = _width(server_args, cfg, algorithm)
    if width < 1:
        flag = WIDTH_FLAGS.get(algorithm, "--speculative-num-steps")
        typed = getattr(cfg, flag.removeprefix("--").replace("-", "_"), None)
        got = f"{flag} {typed}, which makes {width} rows per request"
        raise refusal(
            [Rejection("speculative decoding", got, ">= 1", f"{flag} 1", ((flag, "1"),), "config")]
        )
    return width


def _width(server_args: Any, cfg: Any, algorithm: str) -> int:
    verified = _resolved_width(server_args) if _is_resolved(server_args) else 0
    if algorithm == "NGRAM":
        return max(verified, cfg.speculative_num_draft_tokens or NGRAM_DEFAULT)
    if algorithm == "DFLASH":
        return max(verified, _dflash_width(server_args, cfg))
    if algorithm == "DSPARK":
        return max(verified, _dspark_width(server_args, cfg))
    return max(verified, _eagle_width(server_args, cfg, algorithm))


def _is_resolved(server_args: Any) -> bool:
    # The speculative hook runs long after ours; what it declares carries its own source.
    declared = getattr(server_args, "_resolved_overrides", None) or ()
    return any("speculative_num_draft_tokens" in fields for _, fields in declared)


def _resolved_width(server_args: Any) -> int:
    from sglang.srt.arg_groups.overrides import max_speculative_num_draft_tokens

    return int(max_speculative_num_draft_tokens(server_args) or 0)


def _eagle_width(server_args: Any, cfg: Any, algorithm: str) -> int:
    steps, top_k = cfg.speculative_num_steps, cfg.speculative_eagle_topk
    drafted = cfg.speculative_num_draft_tokens
    if getattr(cfg, "speculative_adaptive", False):
        return max(_adaptive_width(cfg), (steps or 0) + 1, drafted or 1)
    if steps is None:
        default = EAGLE_DEFAULT
        if algorithm != "STANDALONE" and _architecture(server_args) in WIDE_EAGLE_ARCHITECTURES:
            default = WIDE_EAGLE_DEFAULT
        steps, top_k = default[0], top_k or default[1]
        drafted = drafted or default[2]
    top_k = top_k or 1
    if top_k == 1:
        return int(steps) + 1  # the host overwrites any other number of draft tokens
    return int(max(drafted or 1, steps + 1, top_k))


def _adaptive_width(cfg: Any) -> int:
    from sglang.srt.speculative.adaptive_spec_params import resolve_candidate_steps_from_config

    candidates = resolve_candidate_steps_from_config(cfg_path=cfg.speculative_adaptive_config)
    return int(max(candidates)) + 1


def _dflash_width(server_args: Any, cfg: Any) -> int:
    block = getattr(cfg, "speculative_dflash_block_size", None)
    if block or cfg.speculative_num_draft_tokens:
        return int(block or cfg.speculative_num_draft_tokens)
    try:
        from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config

        config = parse_dflash_draft_config(draft_hf_config=draft_config(server_args, cfg))
        return int(config.resolve_block_size(default=None) or DFLASH_DEFAULT)
    except Exception:  # the host's own fallback, with the same breadth
        return DFLASH_DEFAULT


def _dspark_width(server_args: Any, cfg: Any) -> int:
    gamma = getattr(cfg, "speculative_dspark_block_size", None)
    if gamma is None:
        try:
            from sglang.srt.speculative.dspark_components.dspark_config import (
                DEFAULT_DSPARK_GAMMA,
                read_draft_checkpoint_config,
            )

            config = read_draft_checkpoint_config(server_args=server_args)
            gamma = config.resolve_gamma(default=None)
            gamma = gamma or (None if cfg.speculative_num_draft_tokens else DEFAULT_DSPARK_GAMMA)
        except Exception:  # the host logs and goes on with what was typed
            gamma = None
    if gamma is None:
        return int(cfg.speculative_num_draft_tokens or 1)
    return int(gamma) + 1


def own_draft(cfg: Any) -> bool:
    """Whether the draft is made of the target's own checkpoint, however its path is spelled."""
    target, draft = str(cfg.model_path), cfg.speculative_draft_model_path
    if not draft or draft == target:
        return True
    # A name on a hub is no path, and its two spellings are two models.
    local = os.path.exists(draft) and os.path.exists(target)
    return local and os.path.realpath(draft) == os.path.realpath(target)


def draft_has_routed_moe(server_args: Any, cfg: Any) -> bool:
    """Whether the draft model has routed MoE layers; a separate draft is read from its config."""
    if not cfg.speculative_algorithm or cfg.speculative_algorithm.upper() == "NGRAM":
        return False
    if own_draft(cfg):
        from sglang.srt.arg_groups.overrides import model_config_of

        # Multi-token-prediction layers of the target checkpoint repeat its MoE.
        return has_routed_moe(model_config_of(server_args))
    try:
        config = draft_config(server_args, cfg)
    except Exception:  # not readable here: the host will say so with its own message
        return True
    return routed_experts(getattr(config, "text_config", config)) > 1


def draft_shape(server_args: Any, cfg: Any, backend: str) -> tuple[int, int] | None:
    """(hidden size, routed experts) of a separate draft on the same all-to-all; None without."""
    own = getattr(cfg, "speculative_moe_a2a_backend", None) or backend
    if not cfg.speculative_algorithm or own_draft(cfg) or own != backend:
        return None
    try:
        config = draft_config(server_args, cfg)
    except Exception:  # not readable here: the host will say so with its own message
        return None
    text = getattr(config, "text_config", config)
    experts = routed_experts(text)
    return (int(getattr(text, "hidden_size", 0)), experts) if experts > 1 else None


def draft_config(server_args: Any, cfg: Any) -> Any:
    """Hugging Face configuration of a separate draft model."""
    from sglang.srt.utils.hf_transformers_utils import get_config

    del server_args
    return get_config(
        cfg.speculative_draft_model_path,
        trust_remote_code=cfg.trust_remote_code,
        revision=cfg.speculative_draft_model_revision,
        model_override_args=json.loads(cfg.json_model_override_args),
    )


def _architecture(server_args: Any) -> str:
    from sglang.srt.arg_groups.overrides import model_config_of

    return str((model_config_of(server_args).hf_config.architectures or [""])[0])
