"""Memory of multimodal models, and of models with linear attention or sliding windows, as the host
sizes it."""

from __future__ import annotations

from typing import Any

import pytest

from ..support.resolving import LL, QWEN3_30B, Worker, variant, write_models

TP8 = ("--tp-size", "8", "--attn-dp-size", "8")
ON = ("--use-batched-dp-moe", "on")
OFF = ("--use-batched-dp-moe", "off")
TEXT = variant(
    QWEN3_30B,
    model_type="qwen3_vl_moe_text",
    rope_scaling={"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
)
VL: dict[str, Any] = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "text_config": TEXT,
    "vision_config": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "model_type": "qwen3_vl_moe",
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [1, 2, 3],
    },
    "image_token_id": 1,
    "video_token_id": 2,
    "vision_start_token_id": 3,
    "vision_end_token_id": 4,
    "torch_dtype": "bfloat16",
}
LARGE = variant(
    TEXT, hidden_size=4096, moe_intermediate_size=1536, num_hidden_layers=94, vocab_size=151936
)
NEXT = variant(
    QWEN3_30B,
    architectures=["Qwen3NextForCausalLM"],
    model_type="qwen3_next",
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
    num_hidden_layers=48,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    num_experts_per_tok=10,
    linear_num_key_heads=16,
    linear_key_head_dim=128,
    linear_num_value_heads=32,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
    full_attention_interval=4,
    partial_rotary_factor=0.25,
)
WINDOWS = variant(
    QWEN3_30B,
    architectures=["MiMoV2FlashForCausalLM"],
    model_type="mimo_v2_flash",
    n_routed_experts=128,
    moe_intermediate_size=2048,
    v_head_dim=128,
    swa_num_attention_heads=32,
    swa_num_key_value_heads=8,
    swa_head_dim=192,
    swa_v_head_dim=128,
    head_dim=192,
    sliding_window=128,
    sliding_window_size=128,
    hybrid_layer_pattern=[0, 1, 1, 0],
    moe_layer_freq=[0, 1, 1, 1],
    n_group=1,
    topk_group=1,
    topk_method="noaux_tc",
    scoring_func="sigmoid",
    add_swa_attention_sink_bias=True,
    add_full_attention_sink_bias=False,
    swa_rope_theta=10000,
    layernorm_epsilon=1e-5,
    attention_bias=False,
)
STATE = 36 * (4 * 32 * 128 * 128 + 2 * 3 * (2 * 2048 + 4096))
"""Bytes of NEXT on one rank: float32 of every value head, three bf16 positions before the
convolution, in three of four layers."""
SHARE = 0.9 / 1.9


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """This module's models."""
    more = {"vl": VL, "vl-large": variant(VL, text_config=LARGE), "next": NEXT, "windows": WINDOWS}
    return write_models(tmp_path_factory.mktemp("models"), more)


def fraction(answer: dict[str, Any]) -> float:
    """What the launch keeps for weights and KV cache."""
    assert answer["ok"], answer["error"]
    return float(answer["resolved"]["mem_fraction_static"])


@pytest.mark.parametrize(
    "flags",
    [(), ("--disaggregation-mode", "decode"), ("--language-only",), ("--attn-dp-size", "2")],
)
def test_the_plan_knows_what_the_host_keeps_for_towers(
    worker: Worker, models: dict[str, str], flags: tuple[str, ...]
) -> None:
    """Before the host decides it; and that it captures no prefills of this model."""
    argv = ["--model-path", models["vl"], *TP8, *LL, *flags]
    stock, ours = worker.ask([{"argv": [*argv, *OFF]}, {"argv": argv}])
    assert ours["ok"], ours["error"]
    assert ours["plan"]["cuda_graph_max_bs_prefill"] == 0
    memory = ours["plan"]["memory"]
    assert memory["stock_fraction"] == pytest.approx(fraction(stock), abs=0.0011)
    assert (memory["towers_bytes"] > 0) == (not flags or flags[0] == "--attn-dp-size")
    assert memory["media_bytes"] > 0
    static = int(memory["usable_bytes"] * fraction(ours))
    assert memory["kv_cache_bytes"] == static - memory["weights_bytes"] - memory["media_bytes"]


def test_no_room_beside_towers_is_refused(worker: Worker, models: dict[str, str]) -> None:
    """62 GiB of weights of 78 leave a KV cache, but none to speak of beside what the host keeps for
    images; the fix leaves one."""
    argv = ["--model-path", models["vl-large"], *ON]
    tight, wide = worker.ask(
        [
            {"argv": [*argv, *TP8]},
            {"argv": [*argv, "--tp-size", "16", "--attn-dp-size", "16"]},
        ]
    )
    assert not tight["ok"]
    assert "for images, video and audio" in tight["error"]
    assert tight["errors"][0]["changes"] == [["--tp-size", "16"], ["--attn-dp-size", "16"]]
    assert wide["ok"], wide["error"]
    memory = wide["plan"]["memory"]
    assert memory["kv_cache_bytes"] >= memory["device_bytes"] // 32
    assert memory["mem_fraction_static"] == fraction(wide)


DETERMINISTIC = (
    *("--enable-deterministic-inference", "--attention-backend", "flashinfer"),
    *("--chunked-prefill-size", "8192"),
)


@pytest.mark.parametrize(
    ("flags", "env"),
    [
        (("--disable-radix-cache",), {}),
        (("--disaggregation-mode", "decode"), {}),
        # The host gives up its radix cache after memory is sized.
        (DETERMINISTIC, {"SGLANG_FLASHINFER_PREFILL_SPLIT_TILE_SIZE": "1024"}),
    ],
)
def test_filled_requests_leave_a_kv_cache_beside_their_states(
    worker: Worker, models: dict[str, str], flags: tuple[str, ...], env: dict[str, str]
) -> None:
    """Without a radix cache the host allocates one state for each, whatever memory there is."""
    argv = ["--model-path", models["next"], *TP8, *LL, "--batched-dp-moe-max-tokens", "1024"]
    (answer,) = worker.ask([{"argv": [*argv, *flags], "env": env}])
    assert answer["ok"], answer["error"]
    memory, running = answer["plan"]["memory"], answer["plan"]["max_running_requests"]
    assert answer["resolved"]["max_running_requests"] == running < 8 * 1024
    states = (running // 8 + 1) * STATE
    assert states <= memory["kv_room_bytes"] * SHARE < 1.3 * states


def test_requests_are_filled_by_t_where_the_host_divides_memory(
    worker: Worker, models: dict[str, str]
) -> None:
    """With a radix cache, or a typed number of states."""
    argv = ["--model-path", models["next"], *TP8, *LL, "--batched-dp-moe-max-tokens", "1024"]
    typed = ("--disable-radix-cache", "--max-mamba-cache-size", "800")
    for answer in worker.ask([{"argv": argv}, {"argv": [*argv, *typed]}]):
        assert answer["ok"], answer["error"]
        assert answer["plan"]["max_running_requests"] == 8 * 1024


@pytest.mark.parametrize("name", ["next", "windows"])
def test_tokens_that_are_not_alike_are_not_counted(
    worker: Worker, models: dict[str, str], name: str
) -> None:
    """States and windows have a share of the KV cache that is not the plan's to know."""
    (answer,) = worker.ask([{"argv": ["--model-path", models[name], *TP8, *LL]}])
    assert answer["ok"], answer["error"]
    memory = answer["plan"]["memory"]
    assert memory["kv_token_bytes"] is None
    assert memory["kv_cache_tokens"] is None
    assert memory["kv_cache_bytes"] > 0
