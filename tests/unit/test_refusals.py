"""Every hard limit and every feature that cannot run: one refusal, with the way out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_plugin.planning.expert_choice import BF16_ROWS
from moe_plugin.planning.facts import LaunchFacts, ModelFacts
from moe_plugin.planning.fixes import applied, complete
from moe_plugin.planning.limits import Limits
from moe_plugin.planning.plan import Rejection

from .test_budgets import QWEN, T_FLAG, T_VARIABLE, V3, one_error, plan

LEAVE = "run without it: --moe-a2a-backend none --use-batched-dp-moe off"
LL = "--deepep-mode low_latency"


@pytest.mark.parametrize(
    ("model", "launch", "limit", "got", "fix"),
    [
        (replace(V3, hidden_size=2880), {}, "hidden size", "2880", LEAVE),
        (replace(V3, top_k=17), {}, "experts per token", "17", LEAVE),
        (
            replace(V3, num_experts=252),
            {"tp_size": 12, "attn_dp_size": 12},
            "expert-parallel ranks",
            "--tp-size 12",
            LEAVE,
        ),
        (replace(V3, num_experts=1, top_k=1), {}, "experts", "1", LEAVE),
        (replace(V3, dtype="float16"), {}, "activation dtype", "float16", "--dtype bfloat16"),
        (
            replace(V3, num_experts=250),
            {"tp_size": 8},
            "experts per rank",
            "250 experts over 8 ranks",
            "--ep-num-redundant-experts 6, or a --tp-size that divides 250",
        ),
        (
            replace(V3, num_experts=8),
            {"tp_size": 16, "attn_dp_size": 16},
            "experts per rank",
            "8 experts over 16 ranks",
            "--ep-num-redundant-experts 8, or a --tp-size that divides 8",
        ),
        (V3, {"max_tokens": 2048}, "tokens per rank", "2048", f"{T_FLAG} 1024"),
        (QWEN, {"max_tokens": 100}, "tokens per rank", "100", f"{T_FLAG} 104"),
        (V3, {"max_tokens": 100}, "tokens per rank", "100", f"{T_FLAG} 128"),
        (V3, {"max_tokens": 104, "tp_size": 8}, "tokens per rank", "104", f"{T_FLAG} 112"),
        (V3, {"host_tokens_per_rank": 2000}, "tokens per rank", "=2000", f"{T_VARIABLE}=1024"),
        (V3, {"host_tokens_per_rank": 0}, "tokens per rank", "=0", f"{T_VARIABLE}=256"),
        (
            replace(V3, num_experts=896),
            {"max_tokens": 1024},
            "communication buffer bytes per rank",
            "(49.77 GiB) for --batched-dp-moe-max-tokens 1024",
            f"{T_FLAG} 640",
        ),
        (
            V3,
            {"lora": True},
            "LoRA",
            "adapters on the routed experts",
            f"remove --enable-lora and --lora-paths, or {LEAVE}",
        ),
        (
            V3,
            {"single_batch_overlap": True},
            "single-batch overlap",
            "compute capability 9.0",
            "remove --enable-single-batch-overlap",
        ),
        (
            V3,
            {"waterfill": True, "has_deep_gemm": False},
            "fused shared experts",
            "a shared expert per rank",
            "remove --enable-waterfill",
        ),
        (
            V3,
            {"dispatch_dtype": "bf16"},
            "dtype of dispatched rows",
            "bf16 (--deepep-dispatcher-output-dtype) with fp8_block weights",
            "remove --deepep-dispatcher-output-dtype",
        ),
        (
            V3,
            {"dispatch_dtype": "bf16", "moe_runner_backend": "deep_gemm"},
            "dtype of dispatched rows",
            "bf16 (--deepep-dispatcher-output-dtype) with fp8_block weights",
            "remove --deepep-dispatcher-output-dtype",
        ),
        (
            V3,
            {"chunk_alignment": 4096},
            "prefill chunk with deterministic inference",
            "256 tokens per DP group",
            "SGLANG_FLASHINFER_PREFILL_SPLIT_TILE_SIZE=256, or --attention-backend triton, which "
            "has none",
        ),
        (
            replace(QWEN, hidden_act="silu, limited"),
            {"moe_runner_backend": "deep_gemm"},
            "MoE runner",
            "leaves the limit of Qwen3MoeForCausalLM out",
            "--moe-runner-backend auto",
        ),
        (
            replace(V3, hidden_act="silu, clamped"),
            {"moe_runner_backend": "deep_gemm"},
            "MoE runner",
            "leaves the clamp of DeepseekV3ForCausalLM out",
            "--moe-runner-backend auto",
        ),
        (
            replace(V3, weight_format="fp8_fp4"),
            {"moe_runner_backend": "deep_gemm"},
            "MoE runner",
            "DeepGEMM needs compute capability 10.0",
            "--moe-runner-backend auto",
        ),
        (
            replace(V3, weight_format="mxfp4"),
            {"moe_runner_backend": "deep_gemm"},
            "experts for the batched layout",
            "DeepGEMM needs compute capability 10.0",
            LEAVE,
        ),
        (
            replace(V3, weight_format="awq"),
            {},
            "experts for the batched layout",
            "awq weights",
            LEAVE,
        ),
        (
            replace(V3, hidden_act="gelu", weight_format="unquantized"),
            {},
            "experts for the batched layout",
            "unquantized weights, gelu",
            LEAVE,
        ),
        (V3, {"diffusion": True}, "rows per rank and forward", "--dllm-algorithm", LEAVE),
        (
            V3,
            {"pipeline_warmup": True, "pp_size": 2},
            "rows per rank and forward",
            "warm-up batches of up to 64 rows",
            "unset SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP",
        ),
        (
            V3,
            {"draft_shape": (2048, 64)},
            "one buffer for target and draft",
            "(2048, 64)",
            "--speculative-moe-a2a-backend none",
        ),
        (
            V3,
            {"moe_runner_backend": "triton"},
            "MoE runner",
            "--moe-runner-backend triton",
            "--moe-runner-backend auto",
        ),
        (
            replace(V3, weight_format="fp8_fp4"),
            {"load_format": "sharded_state"},
            "load format",
            "--load-format sharded_state with fp8_fp4 weights",
            f"the checkpoint itself with --load-format auto, or {LEAVE}",
        ),
        (
            replace(V3, weight_format="compressed-tensors_int4"),
            {"load_format": "remote_instance"},
            "load format",
            "--load-format remote_instance",
            "--load-format auto",
        ),
        (
            replace(V3, weight_format="fp8_fp4"),
            {"weight_cache": True},
            "load format",
            "--weight-cache-mode",
            "--weight-cache-mode off",
        ),
        (
            QWEN,
            {"deepep_mode": "auto", "has_deep_gemm": False},
            "experts for prefill",
            "--deepep-mode auto",
            LL,
        ),
        (
            QWEN,
            {"deepep_mode": "auto"},
            "experts for the batched layout",
            "--deepep-mode auto",
            "--moe-runner-backend deep_gemm",
        ),
        (replace(V3, architecture="GptOssForCausalLM"), {}, "model", "GptOssForCausalLM", LEAVE),
    ],
)
def test_hard_limits_are_refused_with_the_way_out(
    model: ModelFacts, launch: dict[str, object], limit: str, got: str, fix: str
) -> None:
    """Every limit of the transport and every feature that cannot run: one rejection, which says
    what was found and what to type instead."""
    error = one_error(plan(model, **launch))
    assert (error.limit, error.fix) == (limit, fix)
    assert got in str(error)
    if fix.endswith(LEAVE):
        assert error.limit == "LoRA" or ("--use-batched-dp-moe", "off") in error.changes


@pytest.mark.parametrize("name", ["sharded_state", "presharded", "remote", "remote_instance"])
def test_load_formats_are_refused_where_weights_are_repacked(name: str) -> None:
    """FP4 on the host's Humming, and FP8, stay as the host holds them."""
    packed = replace(V3, weight_format="awq_marlin_int4")
    stored = name == "remote"
    error = one_error(plan(packed, load_format=name, key_value_store=stored))
    assert error.limit == "load format"
    assert not plan(packed, load_format="dummy").errors
    assert not plan(V3, load_format=name).errors
    fp4 = replace(V3, weight_format="fp8_fp4")
    assert not plan(fp4, load_format=name, moe_runner_backend="humming").errors


def test_a_remote_file_store_holds_a_plain_checkpoint() -> None:
    """The host loads and repacks it as from a disk; only key-value stores hold a dump."""
    packed = replace(V3, weight_format="awq_marlin_int4")
    assert not plan(packed, load_format="remote").errors
    assert plan(packed, load_format="remote", key_value_store=True).errors


@pytest.mark.parametrize(
    ("source", "dtype"), [("--deepep-dispatcher-output-dtype", "fp8"), (BF16_ROWS, "auto")]
)
def test_a_variable_that_is_unset_takes_no_dtype_with_it_that_a_flag_names(
    source: str, dtype: str
) -> None:
    """The launch that a fix is tried on is the one that its user then types."""
    asked = {"dispatch_dtype": "fp8", "dispatch_dtype_source": source, "layers_by_runner": True}
    _, fixed = applied(V3, LaunchFacts(**asked), Limits(), [(BF16_ROWS, None)])  # type: ignore[arg-type]
    assert (fixed.dispatch_dtype, fixed.layers_by_runner) == (dtype, False)


def test_a_limit_without_a_fix_is_named_once() -> None:
    """However often planning comes back to it; and it takes the fix that another one opens."""
    rows = Rejection("rows", "16", "8", "--page-size 8", (("--page-size", "8"),))
    memory = Rejection("device memory", "a lot", "less", "more ranks")
    opened = replace(memory, fix="--tp-size 16", changes=(("--tp-size", "16"),))
    for again, found in ((memory, (rows, memory)), (opened, (rows, opened))):
        asked = complete((rows, memory), V3, LaunchFacts(), Limits(), lambda *_, a=again: (a,))
        assert asked == found
