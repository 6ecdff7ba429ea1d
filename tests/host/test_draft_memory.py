"""A draft from another checkpoint weighs on a rank what the host's loader makes of it there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..support.resolving import DEEPSEEK_V3, LL, QWEN3_30B, Worker, variant, write_models

VOCABULARY = {"vocab_size": 129280}
V3 = variant(DEEPSEEK_V3, **VOCABULARY)
CHECKPOINTS = {
    "target": V3,
    "copy": V3,
    "nextn": variant(
        V3,
        architectures=["DeepseekV3ForCausalLMNextN"],
        num_hidden_layers=1,
        num_nextn_predict_layers=0,
        first_k_dense_replace=0,
    ),
    "qwen3-moe": variant(QWEN3_30B, **VOCABULARY),
    "qwen3-dense": {
        **{k: v for k, v in QWEN3_30B.items() if "expert" not in k and k[:4] != "moe_"},
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **VOCABULARY,
    },
    "llama-eagle": {
        "architectures": ["LlamaForCausalLMEagle"],
        "model_type": "llama",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 1,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
        **VOCABULARY,
    },
}
NEXTN_BYTES = 14_800_000_000
"""Of a public checkpoint with one draft layer, embedding and head."""
ABSORBED = 2 * 512 * 128 * (128 + 128)
"""MLA's up-projections a second time: made after loading, so that no parameter holds them."""
EAGLE = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3",
         "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")  # fmt: skip
STANDALONE = ("--speculative-algorithm", "STANDALONE", *EAGLE[2:])
NODES = ("--nnodes", "2", "--node-rank", "0", "--dist-init-addr", "127.0.0.1:5000")
APART = ("--moe-dense-tp-size", "1", "--enable-dp-lm-head")
"""Typed, since a plan fills them without a draft of its own only."""
NO_A2A = ("--speculative-moe-a2a-backend", "none")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Configurations of a target and its drafts; an index where a public one says its bytes."""
    found = write_models(tmp_path_factory.mktemp("drafts"), CHECKPOINTS)
    index = {"metadata": {"total_size": NEXTN_BYTES}, "weight_map": {}}
    (Path(found["nextn"]) / "model.safetensors.index.json").write_text(json.dumps(index))
    return found


@pytest.fixture(scope="module")
def host(paths: dict[str, str]) -> Any:
    """A process with the host, for an H200."""
    worker = Worker(paths["target"], "h200", oracle=True)
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("draft", "ranks", "groups", "flags"),
    [
        ("nextn", 16, 16, EAGLE),
        ("nextn", 8, 8, EAGLE),
        ("nextn", 8, 2, EAGLE),
        ("copy", 8, 8, EAGLE),
        ("copy", 8, 8, (*EAGLE, *NO_A2A)),
        ("llama-eagle", 8, 1, EAGLE),
        ("qwen3-moe", 8, 1, (*STANDALONE, *NO_A2A)),
        ("qwen3-dense", 8, 1, STANDALONE),
    ],
)
def test_a_draft_weighs_what_the_host_makes_of_it(
    host: Worker,
    paths: dict[str, str],
    draft: str,
    ranks: int,
    groups: int,
    flags: tuple[str, ...],
) -> None:
    """The layers that are loaded, divided as they are; EAGLE's without embedding and head, which
    become the target's. A standalone draft keeps its own."""
    argv = ["--model-path", paths["target"], "--tp-size", f"{ranks}", *LL]
    argv += ["--attn-dp-size", f"{groups}", "--max-running-requests", "256"]
    argv += (APART if groups > 1 else ()) + (NODES if ranks > 8 else ())
    speculative = [*argv, *flags, "--speculative-draft-model-path", paths[draft]]
    alone, launch = host.ask([{"argv": argv}, {"argv": speculative, "built_draft": True}])
    assert launch["ok"], launch["error"]
    assert "oracle" not in launch, launch["oracle"]
    weights = [answer["plan"]["memory"]["weights_bytes"] for answer in (alone, launch)]
    planned, built = weights[1] - weights[0], launch["draft"]["weights"]
    planned -= ABSORBED * groups // ranks if draft in ("nextn", "copy") else 0
    built -= launch["draft"]["ends"] if flags[:2] == EAGLE[:2] else 0
    print(f"{draft} {ranks}/{groups}: planned {planned / 2**30:.3f}, built {built / 2**30:.3f} GiB")
    assert planned == pytest.approx(built, rel=0.05)
