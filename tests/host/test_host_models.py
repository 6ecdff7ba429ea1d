"""The lists of models, against the source of the host's models."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from moe_plugin.planning.host_models import (
    FUSED_SHARED,
    MIXTRAL_FORMATS,
    MOVES_BY_NAME,
    NO_DISPATCHER,
    NO_REDUNDANT,
    PLAIN_EXPERTS,
    REFUSED_BY_HOST,
    UNPROVEN,
    WRAPS,
    WRONG_SUMS,
)  # fmt: skip

FUSED = re.compile(r"fused_moe import fused_moe$", re.MULTILINE)
ITS_OWN = re.compile(r"get_moe_impl_class\(")
PLAIN = re.compile(r"(?<!\w)(?:FusedMoE\(|EPMoE)")
ALL_TO_ALL = re.compile(r"deepep|a2a")
REFUSES = re.compile(r"raise NotImplementedError\(\s*\"[^\"]*(?:DeepEP|forward_deepep)", re.DOTALL)
BUILT = re.compile(
    r"get_moe_impl_class\([^)]*\)\(\s*num_experts=(.*?),\s*\n\s*(?:top_k|num_fused|layer_id|hidden)",
    re.DOTALL,
)
BORDERS = re.compile(r"append_stages\(")
SUMS = re.compile(r"(?:all_reduce|reduce_moe_output)\(")
SHARED = re.compile(r"shared_experts? = |shared_mlp = ")
# In the same file as models with experts: a dense one; and wrappers of transformers' own models,
# which a plan knows by one name, whatever they wrap.
OTHERS = re.compile(r"^HunYuanDenseV1ForCausalLM$|^Transformers")


def _entry_classes(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EntryClass":
            value = node.value
            names = value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]
            return [ast.unparse(name) for name in names]
    return []


@cache
def _sources() -> dict[str, str]:
    """Source of the file that defines each architecture."""
    host = find_spec("sglang")
    assert host is not None
    assert host.submodule_search_locations
    found = {}
    for path in Path(host.submodule_search_locations[0], "srt", "models").rglob("*.py"):
        source = path.read_text()
        found |= dict.fromkeys(_entry_classes(ast.parse(source)), source)
    return found


def _models(holds: Callable[[str], object]) -> set[str]:
    return {name for name, source in _sources().items() if holds(source)}


def test_models_that_call_the_fused_kernel_reach_no_dispatcher() -> None:
    """Whatever backend is selected: there is nothing to bound."""
    fused = _models(lambda source: FUSED.search(source) and not ALL_TO_ALL.search(source))
    assert fused == NO_DISPATCHER - {"QuantMixtralForCausalLM"}
    lists = _sources()["QuantMixtralForCausalLM"]
    assert not ITS_OWN.search(lists)
    assert not PLAIN.search(lists)


def test_models_whose_source_never_speaks_of_an_all_to_all_are_listed() -> None:
    """Each was looked at: a new one is refused by this test until somebody has."""

    def silent(source: str) -> bool:
        experts = ITS_OWN.search(source) or PLAIN.search(source)
        return bool(experts and not ALL_TO_ALL.search(source))

    found = _models(silent)
    listed = WRONG_SUMS | UNPROVEN
    assert {"MixtralForCausalLM", "TransformersMoEForCausalLM"} <= found
    assert sorted(n for n in found - listed if not OTHERS.match(n)) == []
    # No name ages: what is listed is still a model of the host's, and still says nothing.
    speaks = {name for name in listed if ALL_TO_ALL.search(_sources().get(name, "a2a"))}
    assert speaks == {"Ernie4_5_MoeForCausalLM"}  # in a comment


def test_models_that_the_host_refuses() -> None:
    """They raise where DeepEP is selected."""
    found = _models(lambda source: ALL_TO_ALL.search(source) and REFUSES.search(source))
    assert found == REFUSED_BY_HOST


def test_models_whose_layers_hold_no_redundant_experts() -> None:
    """The host counts them wherever it places experts: a layer of these has none, or raises."""

    def lacks(source: str) -> bool:
        if not ALL_TO_ALL.search(source) or "get_model_config_for_expert_location" not in source:
            return False
        built = BUILT.search(source)
        counted = built is None or built[1] == "self.num_experts" or "redundant" in built[1]
        return "ep_num_redundant_experts == 0" in source or not counted

    derived = {  # from DeepSeek's classes, in GLM's file
        "GlmMoeDsaForCausalLM", "GlmMoeDsaForCausalLMNextN",
    }  # fmt: skip
    elsewhere = {
        "BailingMM2NativeForConditionalGeneration", "BailingMMNativeForConditionalGeneration",
        "Glm4vMoeForConditionalGeneration",
    }  # fmt: skip
    found = _models(lacks) - REFUSED_BY_HOST
    assert found - derived == NO_REDUNDANT - elsewhere
    assert all(
        "Glm4MoeModel(" in _sources()[n] or "bailing_moe" in _sources()[n] for n in elsewhere
    )


def test_wrappers_wrap_what_is_said() -> None:
    """By what they import."""
    for outer, inner in WRAPS.items():
        assert re.search(rf"import\s+\(?[^)]*\b{inner}\b", _sources()[outer]), outer


def test_models_whose_rebalances_move_every_parameter() -> None:
    """No filter by the number of experts, or a list that is made while weights load."""

    def moves(source: str) -> bool:
        listed = source.partition("def get_moe_weights(")[2].partition("\n    def ")[0]
        early = "routed_experts_weights_of_layer = {" in source and "LazyValue" not in source
        return bool(listed) and ("filter_moe_weight_param" not in listed or early)

    # By their experts' file; the rest take these experts from another one.
    elsewhere = {
        "BailingMM2NativeForConditionalGeneration", "BailingMMNativeForConditionalGeneration",
        "Dots3NoteForCausalLM",
    }  # fmt: skip
    assert _models(moves) == MOVES_BY_NAME - elsewhere
    assert all(re.search(r"bailing_moe|dots3_common", _sources()[name]) for name in elsewhere)


def test_plain_experts_are_built_outside_the_all_to_alls_class() -> None:
    """``FusedMoE(`` and never ``get_moe_impl_class(``."""
    plain = _models(
        lambda source: (
            PLAIN.search(source) and not ITS_OWN.search(source) and not ALL_TO_ALL.search(source)
        )
    )
    # Their experts are in files of their own.
    elsewhere = {n for n in PLAIN_EXPERTS if not PLAIN.search(_sources()[n])}
    assert {n for n in plain if not OTHERS.match(n)} == PLAIN_EXPERTS - elsewhere
    assert elsewhere == {
        "GraniteMoeHybridForCausalLM", "InklingForConditionalGeneration",
        "InklingForConditionalGenerationMTP",
        "Llama4ForConditionalGeneration",
    }  # fmt: skip


def test_unproven_models_have_what_the_others_lack() -> None:
    """Borders that scatter tokens, no sum of their own, no shared experts split over ranks."""
    for name in UNPROVEN - {"IQuestQ1ForCausalLM"}:
        source = _sources()[name]
        assert BORDERS.search(source), name
        assert not SUMS.search(source), name
        assert not SHARED.search(source), name
    # IQuest-Q1's MoE block is told by its layer to leave the sum out.
    source = _sources()["IQuestQ1ForCausalLM"]
    block = source[source.index("self.mlp = IQuestQ1MoEBlock(") :][:300]
    assert "reduce_results=False" in block


def test_zero_experts_share_one_id() -> None:
    """Why T does not bound LongCat: every zero expert of a token becomes a slot of expert 0."""
    host = find_spec("sglang")
    assert host is not None
    assert host.submodule_search_locations
    kernels = Path(host.submodule_search_locations[0], "kernels", "ops", "moe", "ep_moe_kernels.py")
    assert "expert_indices[normal_expert_mask] = 0" in kernels.read_text()


def test_quantised_mixtral_is_another_class() -> None:
    """Unless its quantisation is on the host's list."""
    host = find_spec("sglang")
    assert host is not None
    assert host.submodule_search_locations
    source = Path(host.submodule_search_locations[0], "srt", "model_loader", "utils.py").read_text()
    listed = re.search(r"mixtral_supported = \[(.*?)\]", source, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r'"([\w-]+)"', listed[1])) == MIXTRAL_FORMATS


def test_models_that_fuse_shared_experts_are_deepseeks() -> None:
    """Each is built by DeepSeek's classes, whose gate lets waterfill fuse."""
    gate = re.compile(r"DeepseekV2MoE|Deepseek(?:V2|V3)ForCausalLM")
    for name in FUSED_SHARED:
        assert gate.search(_sources()[name]), name
