"""Published launches of large models: they fit on their devices, or are refused with what helps."""

from __future__ import annotations

from typing import Any

import pytest

from ..support.resolving import DEEPSEEK_V3, LL, ask, variant, write_models

GIB = 1 << 30
V3 = variant(DEEPSEEK_V3, num_hidden_layers=61, first_k_dense_replace=3, vocab_size=129280)
GLM_52 = {
    **{k: v for k, v in V3.items() if k not in ("topk_group", "n_group")},
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "n_group": 1,
    "topk_group": 1,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 2048,
    "vocab_size": 154880,
    "max_position_embeddings": 202752,
}
ON = ("--use-batched-dp-moe", "on")
NODES = ("--node-rank", "0", "--dist-init-addr", "127.0.0.1:5000", "--nnodes")
GLM_RECIPE = (
    *("--tp-size", "8", "--attn-dp-size", "8", "--moe-a2a-backend", "deepep"),
    *("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "1"),
    *("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "2"),
    *("--mem-fraction-static", "0.85", "--chunked-prefill-size", "32768"),
    *("--max-running-requests", "256"),
)
DECODE_RECIPE = (
    *("--chunked-prefill-size", "262144", "--page-size", "64", "--enable-dp-lm-head"),
    *("--attn-dp-size", "16", "--moe-a2a-backend", "deepep", "--disaggregation-mode", "decode"),
    *("--mem-fraction-static", "0.849", "--cuda-graph-max-bs-decode", "64", "--tp-size", "16"),
    *("--max-running-requests", "2048", "--ep-num-redundant-experts", "32"),
    *("--moe-dense-tp-size", "1", *NODES, "2"),
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every launch of this module, resolved for its device in one process each."""
    paths = write_models(tmp_path_factory.mktemp("models"), {"v3": V3, "glm-5.2": GLM_52})
    v3 = ["--model-path", paths["v3"]]
    h100 = {
        f"v3 {ranks}": [*v3, "--tp-size", f"{ranks}", "--attn-dp-size", f"{ranks}", *ON, *nodes]
        for ranks, nodes in ((8, ()), (16, (*NODES, "2")), (32, (*NODES, "4")), (64, (*NODES, "8")))
    }
    h100["v3 32 in 8 groups"] = [
        *(*v3, "--tp-size", "32", "--attn-dp-size", "8", *LL, *NODES, "4"),
    ]
    h100["decode"] = [*v3, *DECODE_RECIPE]
    h100["fix of v3 8"] = [*v3, "--tp-size", "16", "--attn-dp-size", "16", *ON]
    h200 = {"glm": ["--model-path", paths["glm-5.2"], *GLM_RECIPE]}
    found = dict(zip(h100, ask([{"argv": a} for a in h100.values()], paths["v3"]), strict=True))
    glm = ask([{"argv": argv} for argv in h200.values()], paths["glm-5.2"], "h200")
    return found | dict(zip(h200, glm, strict=True))


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        ("v3 16", 57.7),
        ("v3 32", 38.7),
        ("v3 64", 29.2),
        ("v3 32 in 8 groups", 27.4),
        ("decode", 62.5),
        ("glm", 105.6),
        ("fix of v3 8", 57.7),
    ],
)
def test_it_fits(answers: dict[str, dict[str, Any]], name: str, gib: float) -> None:
    """With room for a KV cache, and every byte within the device; dense layers and head are held
    whole where nobody typed otherwise."""
    answer = answers[name]
    assert answer["ok"], answer["error"]
    memory = answer["plan"]["memory"]
    assert memory["weights_bytes"] / GIB == pytest.approx(gib, rel=0.01)
    assert memory["kv_cache_bytes"] > 2 * GIB
    assert memory["kv_cache_tokens"] > 0
    parts = ("weights", "kv_cache", "buffer", "workspace", "graphs", "activations")
    assert sum(memory[f"{part}_bytes"] for part in parts) <= memory["usable_bytes"]
    assert memory["mem_fraction_static"] == answer["resolved"]["mem_fraction_static"]


def test_weights_that_do_not_fit_are_refused(answers: dict[str, dict[str, Any]]) -> None:
    """Eight H100s for DeepSeek-V3; the fix is the launch that fits above."""
    answer = answers["v3 8"]
    assert not answer["ok"]
    assert "of weights" in answer["error"]
    (error,) = answer["errors"]
    assert error["changes"] == [["--tp-size", "16"], ["--attn-dp-size", "16"]]


@pytest.mark.parametrize(("name", "fraction"), [("decode", 0.849), ("glm", 0.85)])
def test_a_published_fraction_is_kept(
    answers: dict[str, dict[str, Any]], name: str, fraction: float
) -> None:
    """Weights and KV cache are what it says; T is what decoding needs, so that it fits."""
    memory = answers[name]["plan"]["memory"]
    static = int(memory["usable_bytes"] * fraction)
    assert memory["weights_bytes"] + memory["kv_cache_bytes"] == static
    assert answers[name]["plan"]["max_dispatch_tokens_per_rank"] in (64, 128)
