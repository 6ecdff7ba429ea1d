"""`--moe-dense-tp-size 1 --enable-dp-lm-head`: filled where nothing forbids it, typed ones kept."""

from __future__ import annotations

import json

import pytest

from moe_plugin.planning.groups_apart import ABLE

from ..support.hosts import host_result
from ..support.resolving import LL, QWEN3_30B, Launch, variant, write_models

DP2 = ("--tp-size", "2", "--attn-dp-size", "2")
DENSE, HEAD = ("--moe-dense-tp-size", "1"), "--enable-dp-lm-head"
DECODES = (*("--disaggregation-mode", "decode"), *("--disaggregation-transfer-backend", "mooncake"))
PREFILLS = (*("--disaggregation-mode", "prefill"), *DECODES[2:])
EAGLE = ("--speculative-algorithm", "EAGLE")
MORE = {"minimax-m2": variant(QWEN3_30B, architectures=["MiniMaxM2ForCausalLM"])}

SHARED = """
import ast, inspect, json, os
from sglang.srt.models import registry

def modules(cls):
    return [inspect.getmodule(base) for base in cls.__mro__
            if base.__module__.startswith("sglang.srt.models.")]

def inner(module):
    # A multimodal wrapper builds another model of the host, by name.
    named = {node.id for node in ast.walk(ast.parse(inspect.getsource(module)))
             if isinstance(node, ast.Name)}
    return [getattr(module, name) for name in named
            if name.endswith(("ForCausalLM", "Model")) and hasattr(module, name)]

found = {}
for name in json.loads(os.environ["ABLE"]):
    cls = registry.ModelRegistry.models[name]
    seen = modules(cls)
    seen += [more for module in list(seen) for other in inner(module) for more in modules(other)]
    found[name] = "\\n".join(inspect.getsource(module) for module in seen)
emit({name: ["use_attn_tp_group=get_parallel().enable_dp_lm_head" in text,
             "is_dense_ffn_fully_dp() else" in text or "is_layer_sparse = True" in text]
      for name, text in found.items()})
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model directories, by name."""
    return write_models(tmp_path_factory.mktemp("models"), MORE)


@pytest.mark.parametrize(
    ("model", "flags", "dense", "head"),
    [
        ("qwen3", (*DP2, *LL), 1, True),
        ("deepseek-v3", (*DP2, *LL), 1, True),
        ("deepseek-v3", (*DP2, *LL, *EAGLE), 1, True),  # drafts by the target's own layers
        ("qwen3", ("--tp-size", "4", "--attn-dp-size", "2", *LL), 1, True),
        ("qwen3", (*DP2, "--use-batched-dp-moe", "on"), 1, True),
        ("qwen3-fp8", (*DP2, *LL, *PREFILLS), 1, True),
        ("qwen3", (*DP2, *LL, *DENSE), 1, True),
        ("qwen3", (*DP2, *LL, HEAD), 1, True),
        ("minimax-m2", (*DP2, *LL, *DENSE, HEAD), 1, True),
        # Kept as it is:
        ("qwen3", ("--tp-size", "2", *LL), None, False),
        ("qwen3", (*DP2, *LL, "--moe-dense-tp-size", "2"), 2, False),
        ("qwen3", (*DP2, *LL, "--enable-tp-lm-head-all-to-all"), None, False),
        ("qwen3-fp8", (*DP2, *LL, *DECODES), None, False),
        ("qwen3-fp8", (*DP2, *LL[:3], "auto"), None, False),  # prefill in normal mode
        ("minimax-m2", (*DP2, *LL), None, False),
        ("qwen3", (*DP2, *LL, "--use-batched-dp-moe", "off"), None, False),
    ],
)
def test_what_is_filled(
    launch: Launch, model: str, flags: tuple[str, ...], dense: int | None, head: bool
) -> None:
    answer = launch(*flags, model=model)
    assert answer["ok"], answer
    found = answer["resolved"]
    assert (found["moe_dense_tp_size"], found["enable_dp_lm_head"]) == (dense, head)
    if answer["plan"]:
        assert answer["plan"]["groups_apart"] == (dense == 1 and head)


def test_a_separate_draft_is_not_touched(launch: Launch, models: dict[str, str]) -> None:
    """It may be of any architecture; both flags change its layers, too."""
    draft = ("--speculative-draft-model-path", models["qwen3"])
    answer = launch(*DP2, *LL, *EAGLE, *draft, model="qwen3-fp8")
    assert answer["ok"], answer
    assert answer["resolved"]["moe_dense_tp_size"] is None


def test_every_architecture_follows_both_flags_in_the_host() -> None:
    """Its LM head is told which ranks share it; its dense layers are whole, or it has none."""
    found = host_result(SHARED, env={"ABLE": json.dumps(sorted(ABLE))})
    assert found == {name: [True, True] for name in ABLE}
