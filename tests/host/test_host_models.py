"""The list of models without a DeepEP forward, against the source of the host's models."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

from moe_plugin.planning.compatibility import NO_DEEPEP_FORWARD, NO_DISPATCHER

FUSED = re.compile(r"fused_moe import fused_moe$", re.MULTILINE)
EXPERTS = re.compile(r"get_moe_impl_class|FusedMoE\(|EPMoE")
ALL_TO_ALL = re.compile(r"deepep|a2a")
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


def _without_all_to_all(experts: re.Pattern[str]) -> set[str]:
    """Models of files that build such experts and never speak of an all-to-all."""
    host = find_spec("sglang")
    assert host is not None
    assert host.submodule_search_locations
    found = set()
    for path in Path(host.submodule_search_locations[0], "srt", "models").rglob("*.py"):
        source = path.read_text()
        if experts.search(source) and not ALL_TO_ALL.search(source):
            found |= set(_entry_classes(ast.parse(source)))
    return found


def test_models_that_call_the_fused_kernel_reach_no_dispatcher() -> None:
    """Whatever backend is selected: there is nothing to bound."""
    assert _without_all_to_all(FUSED) == NO_DISPATCHER


def test_models_whose_source_never_speaks_of_an_all_to_all_are_refused() -> None:
    """They scatter no tokens: every rank would dispatch all rows, of which T is not a bound."""
    found = _without_all_to_all(EXPERTS)
    assert {"MixtralForCausalLM", "TransformersMoEForCausalLM"} <= found
    assert sorted(n for n in found - NO_DEEPEP_FORWARD if not OTHERS.match(n)) == []
