"""What the host's model code does behind an all-to-all, for models that were not written for one.

Since 0.5.23 the host scatters tokens and leaves sums out at the borders of a layer, for every
model. What is left is in a model's own MoE block: it may sum once more, add shared experts that
are split over tensor parallelism, or stay away from a dispatch when it has no tokens.
``tests/host/test_host_models.py`` holds each list against the host's source.
"""

from __future__ import annotations

WRAPS = {
    "BailingMoeV3VLForConditionalGeneration": "BailingMoeV3ForCausalLM",
    "Cohere2VisionForConditionalGeneration": "Cohere2MoeForCausalLM",
    "Step3p7ForConditionalGeneration": "Step3p5ForCausalLM",
}
"""Models around a language model of another class, whatever their configuration says of it."""

NO_DISPATCHER = frozenset(
    {
        "AfmoeForCausalLM", "DbrxForCausalLM", "DeepseekForCausalLM", "QuantMixtralForCausalLM",
        "XverseMoeForCausalLM",
    }
)  # fmt: skip
"""Their experts call a kernel or single MLPs: no all-to-all backend reaches them."""

MIXTRAL_FORMATS = frozenset(
    {"fp8", "compressed-tensors", "gptq_marlin", "awq_marlin", "quark_int4fp8_moe"}
)
"""Quantisations with which a Mixtral checkpoint is ``MixtralForCausalLM``; with any other the host
loads ``QuantMixtralForCausalLM`` (``model_loader/utils.py: get_model_architecture``)."""

REFUSED_BY_HOST = frozenset({"GptOssForCausalLM", "Step3VLForConditionalGeneration"})
"""``NotImplementedError`` with DeepEP, in the constructor or in the first forward."""

NO_REDUNDANT = frozenset(
    {
        "BailingMM2NativeForConditionalGeneration", "BailingMMNativeForConditionalGeneration",
        "BailingMoEForCausalLM", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM",
        "BailingMoeV3ForCausalLM", "Glm4MoeForCausalLM", "Glm4vMoeForConditionalGeneration",
        "LLaDA2MoeModelLM",
    }
)  # fmt: skip
"""Their layers hold no redundant experts, which the host places all the same: they raise while they
are built, or route tokens to experts that are not there."""

MOVES_BY_NAME = frozenset(
    {
        "BailingMM2NativeForConditionalGeneration", "BailingMMNativeForConditionalGeneration",
        "BailingMoEForCausalLM", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM",
        "Dots3NoteForCausalLM", "ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM",
        "LLaDA2MoeModelLM", "LagunaForCausalLM", "MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM",
        "SarvamMLAForCausalLM", "SarvamMoEForCausalLM",
    }
)  # fmt: skip
"""Their list of the weights that a rebalance moves holds every parameter of a layer, also what is
spent once 4-bit weights are repacked, or is made before they are (``get_moe_weights``)."""

FUSED_SHARED = frozenset(
    {
        "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM",
        "DeepseekV4ForCausalLM", "DotsVLMForCausalLM", "GlmMoeDsaForCausalLM",
        "KimiK25ForConditionalGeneration", "KimiVLForConditionalGeneration",
        "MistralLarge3ForCausalLM",
    }
)  # fmt: skip
"""With ``--enable-waterfill`` they keep their shared expert as one more routed expert of each rank
(``models/deepseek_v2.py: has_per_rank_fused_shared_slots``)."""

PLAIN_EXPERTS = frozenset(
    {
        "Cohere2MoeForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSWAForCausalLM",
        "GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM", "Grok1ForCausalLM",
        "Grok1ModelForCausalLM",
        "HYV3ForCausalLM", "HunYuanMoEV1ForCausalLM", "InklingForConditionalGeneration",
        "InklingForConditionalGenerationMTP", "Lfm2MoeForCausalLM", "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration", "MixtralForCausalLM", "OlmoeForCausalLM",
        "PhiMoEForCausalLM",
    }
)  # fmt: skip
"""They build ``FusedMoE`` itself instead of the all-to-all's class, which ours attach to."""

UNPROVEN = frozenset({"IQuestQ1ForCausalLM", "LongcatFlashForCausalLM", "MixtralForCausalLM"})
"""Right on the stock host, as far as its code tells, but T does not bound what they dispatch.

LongCat maps every zero expert to expert 0: one token may fill several of its T slots there.
IQuest-Q1 routes empty batches without the usual special case; Mixtral has plain experts.
"""

WRONG_SUMS = (PLAIN_EXPERTS - UNPROVEN) | {
    "BailingMoeV2_5ForCausalLM", "Ernie4_5_MoeForCausalLM",
    "Ernie4_5_VLMoeForConditionalGeneration", "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration", "InternS2MobiusForConditionalGeneration",
    "KimiLinearForCausalLM", "LagunaForCausalLM", "SarvamMLAForCausalLM", "SarvamMoEForCausalLM",
    "TransformersMoEForCausalLM", "TransformersMultiModalMoEForCausalLM", "ZayaForCausalLM",
}  # fmt: skip
"""With more than one rank they sum complete outputs once more, add shards that nobody sums, or
leave ranks without tokens out of the dispatch. On one rank there is nothing to sum."""
