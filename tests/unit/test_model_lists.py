"""What the lists of the host's models mean for a plan."""

from __future__ import annotations

from dataclasses import replace

from .test_budgets import V3, one_error, plan


def test_repacked_experts_of_models_that_move_every_parameter_stay_where_they_are() -> None:
    """A rebalance would assert in MiMo-V2, and leave the scales behind in Bailing."""
    int4 = replace(V3, weight_format="compressed-tensors_int4", architecture="MiMoV2ForCausalLM")
    error = one_error(plan(int4, tp_size=8, attn_dp_size=8, rebalances=True))
    assert error.limit == "expert rebalancing"
    assert error.changes == (("--enable-eplb", None),)
    assert plan(int4, tp_size=8, attn_dp_size=8).verdict == "ok"
    for model in (replace(int4, weight_format="unquantized"), replace(int4, architecture="")):
        assert plan(model, tp_size=8, attn_dp_size=8, rebalances=True).verdict == "ok"


def test_lists_of_models_know_what_a_model_wraps() -> None:
    """A vision model around BailingMoeV3, or around a language model with plain experts."""
    wrapped = replace(V3, architecture="BailingMoeV3VLForConditionalGeneration")
    assert plan(wrapped, tp_size=8, redundant_experts=8).verdict == "ok"
    wrapped = replace(wrapped, wraps="BailingMoeV3ForCausalLM")
    assert one_error(plan(wrapped, tp_size=8, redundant_experts=8)).limit == "redundant experts"
    plain = replace(V3, architecture="Cohere2VisionForConditionalGeneration")
    assert plan(plain, tp_size=8).verdict == "ok"
    assert plan(replace(plain, wraps="Cohere2MoeForCausalLM"), tp_size=8).verdict == "refused"


def test_layers_that_hold_no_redundant_experts_get_none() -> None:
    """GLM-4.5: the host would place some, whatever their number; none is a fix for its ranks."""
    glm = replace(V3, num_experts=160, architecture="Glm4MoeForCausalLM")
    for redundant in (8, 2):
        error = one_error(plan(glm, tp_size=8, attn_dp_size=8, redundant_experts=redundant))
        assert error.limit == "redundant experts"
        assert error.changes == (("--ep-num-redundant-experts", "0"),)
    error = one_error(plan(glm, tp_size=24, attn_dp_size=24))
    assert error.limit == "experts per rank"
    assert ("--moe-a2a-backend", "none") in error.changes
    assert plan(glm, tp_size=8, attn_dp_size=8).verdict == "ok"
