"""Whether nothing of a model but its experts joins the attention-DP groups.

The host gathers the rows of all groups for dense layers and for the LM head, unless each rank holds
these whole (``--moe-dense-tp-size 1``) or shares them inside its own group
(``--enable-dp-lm-head``). Without that gather every group may replay its own graph; the price is
those weights once per group, which counts as weights.
"""

from __future__ import annotations

from ..batched_backend import Capability, Mode
from .facts import LaunchFacts, ModelFacts

ABLE = frozenset(
    {
        "BailingMoEForCausalLM", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM",
        "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM",
        "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "Glm4vMoeForConditionalGeneration",
        "GlmMoeDsaForCausalLM", "KimiK25ForConditionalGeneration",
        "KimiVLForConditionalGeneration", "MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM",
        "MistralLarge3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
        "Qwen3VLMoeForConditionalGeneration",
    }
)  # fmt: skip
"""Architectures whose LM head and dense layers, where they have any, follow both flags in the host.

Others answer wrongly with them and say nothing (MiniMax-M2 shares its LM head over all ranks
whatever the flag), or have dense layers that stay shared (Step-3.5). Models with linear attention
are left out: what their idle batches do with the flags was not looked at.
"""


def groups_apart(model: ModelFacts, launch: LaunchFacts, capability: Capability) -> bool:
    """Whether the launch runs with both flags: typed, or to be filled."""
    if launch.attn_dp_size == 1 or capability.backend != "deepep":
        return False
    if Mode.EXTEND not in capability.modes:
        return False  # prefill in normal mode: the groups take the same steps
    if typed_apart(launch):
        return True
    return launch.moe_dense_tp_size in (None, 1) and _may_fill(model, launch)


def typed_apart(launch: LaunchFacts) -> bool:
    """Whether the user typed both flags, or the host has resolved them so."""
    return launch.moe_dense_tp_size == 1 and launch.dp_lm_head


def _may_fill(model: ModelFacts, launch: LaunchFacts) -> bool:
    if launch.resolved or launch.tp_lm_head_all_to_all or launch.attn_cp_size > 1:
        return False
    if launch.disaggregation_mode == "decode":
        return False  # nothing prefills there, and the host shares the LM head in a way of its own
    if launch.symmetric_memory:
        return False  # ranks allocate from it together, and would for other numbers of rows
    # A draft model of its own may be of any architecture.
    return model.architecture in ABLE and not launch.separate_draft
