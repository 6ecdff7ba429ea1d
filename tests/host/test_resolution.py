"""The real host resolves command lines under our hooks: fills, contradictions, order, roles."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.resolving import LL, Launch, Worker

CAPACITY = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
TP8 = ("--tp-size", "8", "--attn-dp-size", "8")
ON = ("--use-batched-dp-moe", "on")
T256 = ("--batched-dp-moe-max-tokens", "256")
"""Unset, T would follow the memory that these small models leave."""


def test_on_selects_deepep_and_fills_every_budget(launch: Launch) -> None:
    """One flag: backend, mode, chunk, graphs, running requests, capacity, all from T = 256."""
    answer = launch(*TP8, *T256, "--use-batched-dp-moe", "on", log=True)
    assert answer["ok"], answer
    assert answer["resolved"]["moe_a2a_backend"] == "deepep"
    assert answer["resolved"]["deepep_mode"] == "low_latency"
    assert answer["resolved"]["chunked_prefill_size"] == 256  # of 2048, divided by the host
    assert answer["resolved"]["max_running_requests"] == 2048
    assert answer["decode"]["max_bs"] == 256
    assert answer["prefill"]["max_bs"] == 256
    assert all(size % 8 == 0 for size in answer["prefill"]["bs"])
    assert answer["environment"][CAPACITY] == "256"
    assert "selected moe_a2a_backend=deepep" in answer["log"]
    assert answer["plan"]["chunked_prefill_size"] == 2048


def test_budgets_are_declared_before_the_host_parses_its_graph_flags(launch: Launch) -> None:
    """Later, DeepEP's rounding of prefill buckets would be skipped; memory comes after sizing."""
    declared = launch(*TP8, "--use-batched-dp-moe", "on")["declared"]
    first, parsed = declared.index("moe_plugin"), declared.index("_parse_cuda_graph_config")
    assert first < parsed
    sized = declared.index("_handle_gpu_memory_settings")
    assert "moe_plugin" in declared[sized:]


def test_auto_acts_only_when_the_resolved_configuration_is_batched(launch: Launch) -> None:
    """Default: untouched without DeepEP, planned with it."""
    assert launch(*TP8)["plan"] is None
    assert launch(*TP8, *LL)["plan"]["max_dispatch_tokens_per_rank"] >= 256
    assert launch(*TP8, *LL, model="qwen3-dense")["plan"] is None
    assert launch(*TP8, "--moe-a2a-backend", "deepep", "--deepep-mode", "normal")["plan"] is None


def test_off_touches_nothing(launch: Launch) -> None:
    """The host's own numbers come out, impossible as they are."""
    answer = launch(*TP8, *LL, "--use-batched-dp-moe", "off")
    assert answer["plan"] is None
    assert answer["resolved"]["chunked_prefill_size"] == 1024
    assert answer["resolved"]["max_running_requests"] is None
    assert CAPACITY not in answer["environment"]


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (("--chunked-prefill-size", "1024"), "chunked_prefill_size", 128),
        (("--max-running-requests", "40"), "max_running_requests", 40),
    ],
)
def test_explicit_values_that_work_are_kept(
    launch: Launch, flags: tuple[str, str], field: str, value: int
) -> None:
    """And everything else is still filled."""
    answer = launch(*TP8, "--use-batched-dp-moe", "on", *flags)
    assert answer["resolved"][field] == value
    assert answer["plan"]["cuda_graph_max_bs_prefill"] == answer["prefill"]["max_bs"] > 0


def test_capacity_follows_what_the_user_asked_for(launch: Launch) -> None:
    """A chunk that needs more than 256 rows raises T instead of being refused."""
    answer = launch(*TP8, *LL, "--chunked-prefill-size", "4096")
    assert answer["plan"]["max_dispatch_tokens_per_rank"] == 512
    assert answer["environment"][CAPACITY] == "512"
    assert answer["plan"]["nvshmem_qp_depth"] == 1026


def test_flag_wins_over_variable_only_when_they_agree(launch: Launch) -> None:
    """Two explicit values that differ are refused; a variable alone is taken."""
    env = {CAPACITY: "128"}
    assert launch(*TP8, *LL, env=env)["plan"]["max_dispatch_tokens_per_rank"] == 128
    flag = ("--batched-dp-moe-max-tokens", "128")
    assert launch(*TP8, *LL, *flag, env=env)["plan"]["max_dispatch_tokens_per_rank"] == 128
    answer = launch(*TP8, *LL, *flag, env={CAPACITY: "256"})
    assert not answer["ok"]
    assert f"unset {CAPACITY}" in answer["error"]


def test_a_capacity_that_is_no_number_is_refused_where_we_are_asked_for(launch: Launch) -> None:
    """The host would warn and take 128."""
    answer = launch(*TP8, "--use-batched-dp-moe", "on", env={CAPACITY: "many"})
    assert f"{CAPACITY}=256" in answer["error"]
    assert "128" in answer["error"]


def test_deepep_transport_on_a_cpu_is_refused(launch: Launch) -> None:
    """Asked for by variable; auto takes torch there."""
    on = ("--device", "cpu", "--use-batched-dp-moe", "on")
    answer = launch(*on, env={"MOE_PLUGIN_TRANSPORT": "deepep"})
    assert "unset MOE_PLUGIN_TRANSPORT" in answer["error"]


def test_a_second_resolution_does_not_mistake_our_variable_for_the_users(
    worker: Worker, models: dict[str, str]
) -> None:
    """The first launch exports 512; the second is planned afresh, the third is left alone."""
    base = ["--model-path", models["qwen3"], *TP8]
    first, second, third = worker.ask(
        [
            {"argv": [*base, *LL, "--chunked-prefill-size", "4096"], "keep": True},
            {"argv": [*base, *LL, "--chunked-prefill-size", "2048"], "keep": True},
            {"argv": base},
        ]
    )
    assert first["plan"]["max_dispatch_tokens_per_rank"] == 512
    assert second["plan"]["max_dispatch_tokens_per_rank"] == 256
    assert CAPACITY not in third["environment"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--moe-a2a-backend", "mori"), "--moe-a2a-backend deepep"),
        (("--moe-a2a-backend", "deepep", "--deepep-mode", "normal"), "--deepep-mode low_latency"),
    ],
)
def test_on_refuses_contradictions(launch: Launch, flags: tuple[str, ...], says: str) -> None:
    """Another backend, or normal mode, cannot be meant together with ``on``."""
    answer = launch(*TP8, "--use-batched-dp-moe", "on", *flags)
    assert answer["type"] == "ConfigError"
    assert says in answer["error"]


def test_on_refuses_a_dense_model(launch: Launch) -> None:
    """And says why."""
    answer = launch(*TP8, "--use-batched-dp-moe", "on", model="qwen3-dense")
    assert answer["type"] == "UnsupportedError"
    assert "routed MoE" in answer["error"]


def test_a_backend_that_the_host_selects_late_is_known_early(launch: Launch) -> None:
    """Waterfill and context-parallel DeepSeek: declared before graphs and memory are decided."""
    for flags in (("--enable-waterfill",), ("--enable-prefill-cp", "--cp-strategy", "zigzag")):
        answer = launch("--tp-size", "8", *flags, model="deepseek-v3")
        assert answer["ok"], answer["error"]
        assert answer["plan"]["capability"]["modes"] == ["decode"]
        declared = answer["declared"]
        assert declared.index("moe_plugin") < declared.index("_parse_cuda_graph_config")


def test_old_spelling_of_attention_dp(launch: Launch) -> None:
    """``--dp-size N --enable-dp-attention`` plans like ``--attn-dp-size N``."""
    old = launch("--tp-size", "8", "--dp-size", "4", "--enable-dp-attention", *LL)
    new = launch("--tp-size", "8", "--attn-dp-size", "4", *LL)
    assert old["plan"] == new["plan"]


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (8, 1), (8, 2), (8, 8), (16, 4)])
def test_prefill_buckets_stay_multiples_of_eight(launch: Launch, tp: int, dp: int) -> None:
    """Others can hang all-to-all capture; the host's re-clamp after the DP division makes them."""
    answer = launch("--tp-size", f"{tp}", "--attn-dp-size", f"{dp}", *LL)
    rows = answer["plan"]["max_dispatch_tokens_per_rank"] * tp // dp
    assert answer["resolved"]["chunked_prefill_size"] == rows
    assert all(size % 8 == 0 for size in answer["prefill"]["bs"])
    assert max(answer["prefill"]["bs"]) <= rows


def test_speculation_divides_decode_budgets(launch: Launch, models: dict[str, str]) -> None:
    """EAGLE's default verifies 4 tokens per request."""
    answer = launch(
        *(*TP8, *LL, *T256, "--speculative-algorithm", "EAGLE"),
        *("--speculative-draft-model-path", models["qwen3"]),
    )
    assert answer["resolved"]["speculative_num_draft_tokens"] == 4
    assert answer["decode"]["max_bs"] == 64
    assert answer["resolved"]["max_running_requests"] == 512


@pytest.mark.parametrize(
    ("flags", "width"),
    [
        (("EAGLE", "--speculative-num-steps", "5", "--speculative-eagle-topk", "1",
          "--speculative-num-draft-tokens", "3"), 6),  # the host overwrites 3 by steps + 1
        (("EAGLE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "4",
          "--speculative-num-draft-tokens", "12"), 12),
        (("EAGLE", "--speculative-adaptive"), 8),  # the widest of its candidates
        (("STANDALONE",), 4),
        (("DFLASH", "--speculative-dflash-block-size", "8"), 8),
        (("DFLASH",), 16),
        (("DSPARK", "--speculative-dspark-block-size", "5"), 6),
        (("DSPARK",), 8),
    ],
)  # fmt: skip
def test_draft_width_is_known_before_the_host_resolves_it(
    launch: Launch, models: dict[str, str], flags: tuple[str, ...], width: int
) -> None:
    """Budgets are declared long before ``handle_speculative_decoding`` fills its own defaults."""
    draft = ("--speculative-draft-model-path", models["qwen3"])
    answer = launch("--tp-size", "8", *LL, *T256, "--speculative-algorithm", *flags, *draft)
    assert answer["ok"], answer["error"]
    assert answer["resolved"]["max_running_requests"] == 256 * 8 // width // 8 * 8
    assert answer["decode"]["max_bs"] * width <= 256 * 8


def test_a_draft_of_another_shape_is_refused(launch: Launch, models: dict[str, str]) -> None:
    """Target and draft share one buffer, which the first one sizes."""
    eagle = (*TP8, *LL, "--speculative-algorithm", "EAGLE", "--speculative-draft-model-path")
    answer = launch(*eagle, models["qwen3-235b"])
    assert "--speculative-moe-a2a-backend none" in answer["error"]
    answer = launch(*eagle, models["qwen3-235b"], "--speculative-moe-a2a-backend", "none")
    assert answer["ok"], answer["error"]
    assert launch(*eagle, models["qwen3-dense"])["ok"]


def test_disaggregated_roles_bound_what_they_run(launch: Launch) -> None:
    """A prefill instance has no decode rows, a decode instance no prefill rows to refuse."""
    prefill = launch(*TP8, *LL, *T256, "--disaggregation-mode", "prefill")["plan"]
    assert (prefill["chunked_prefill_size"], prefill["max_running_requests"]) == (2048, 0)
    decode = launch(
        *(*TP8, *LL, "--disaggregation-mode", "decode", "--chunked-prefill-size", "65536")
    )
    assert decode["ok"], decode["error"]
    assert decode["plan"]["max_running_requests"] == 2048
    auto = ("--moe-a2a-backend", "deepep", "--deepep-mode", "auto")
    answer = launch(*TP8, *auto, "--disaggregation-mode", "prefill", model="qwen3-fp8")
    assert answer["plan"] is None


def test_auto_mode_bounds_decode_alone(launch: Launch) -> None:
    """Prefill goes through normal dispatch: the chunk stays the host's."""
    answer = launch(*TP8, "--moe-a2a-backend", "deepep", model="qwen3-fp8")
    assert answer["plan"]["capability"]["modes"] == ["decode"]
    assert answer["plan"]["runner"] == "host"
    assert answer["plan"]["own_decode"]
    assert answer["resolved"]["chunked_prefill_size"] == 1024
    assert answer["resolved"]["max_running_requests"] == 2048


def test_config_file(launch: Launch, tmp_path: Path) -> None:
    """YAML's true means on."""
    config = tmp_path / "serve.yaml"
    config.write_text("tp-size: 8\nattn-dp-size: 8\nuse-batched-dp-moe: on\n")
    answer = launch("--config", str(config))
    assert answer["ok"], answer["error"]
    assert answer["plan"]["max_dispatch_tokens_per_rank"] >= 256


def test_pages_bound_the_chunk_that_we_fill(launch: Launch) -> None:
    """The host insists on whole pages after everything is resolved."""
    answer = launch(*TP8, *LL, "--page-size", "64", "--batched-dp-moe-max-tokens", "200")
    assert answer["resolved"]["chunked_prefill_size"] == 192
    answer = launch(*TP8, *LL, "--page-size", "64", "--batched-dp-moe-max-tokens", "32")
    assert "--batched-dp-moe-max-tokens 64" in answer["error"]


def test_mixed_chunks_leave_room_to_prefill(launch: Launch) -> None:
    """At running >= chunk the host's chunk would be zero or less."""
    answer = launch(*TP8, *LL, *T256, "--enable-mixed-chunk")
    assert answer["resolved"]["max_running_requests"] == 8 * 128
    answer = launch(
        *(*TP8, *ON, "--enable-mixed-chunk", "--chunked-prefill-size", "512"),
        *("--max-running-requests", "512"),
    )
    assert "--max-running-requests 256" in answer["error"]


def test_cpu_resolves_without_graphs(launch: Launch) -> None:
    """``--device cpu`` plans on the torch transport, whose limits are its own."""
    answer = launch(
        *("--device", "cpu", "--tp-size", "2", "--attn-dp-size", "2", "--dtype", "float32"),
        *("--use-batched-dp-moe", "on"),
        model="qwen3-hidden",
    )
    assert answer["ok"], answer["error"]
    assert answer["plan"]["transport"] == "torch"
    assert answer["plan"]["rdma_buffer_bytes"] == 0
    assert answer["plan"]["cuda_graph_max_bs_decode"] == 0
    assert answer["resolved"]["chunked_prefill_size"] == 256


def test_a_cap_of_running_requests_is_lowered_where_the_host_would_take_it(
    launch: Launch,
) -> None:
    """The host lets its KV cache undercut any cap; what T does not carry must wait. ``on`` refuses.

    16,384 is more than any T carries on 8 ranks: it asks for no larger T either.
    """
    auto = ("--moe-a2a-backend", "deepep", "--deepep-mode", "auto")
    typed = ("--max-running-requests", "16384", "--cuda-graph-max-bs-decode", "128")
    answer = launch(*TP8, *auto, *typed, model="qwen3-fp8", log=True)
    assert answer["ok"], answer["error"]
    assert answer["plan"]["max_dispatch_tokens_per_rank"] == 256
    assert answer["resolved"]["max_running_requests"] == 2048
    assert answer["decode"]["max_bs"] == 128
    assert answer["log"].count("--max-running-requests 16384 is lowered to 2048") == 1
    answer = launch(*TP8, *ON, *typed, model="qwen3-fp8")
    assert answer["errors"][0]["changes"] == [["--max-running-requests", "8192"]]


def test_a_cap_is_lowered_again_when_a_wider_draft_comes_to_light(
    launch: Launch, models: dict[str, str]
) -> None:
    """And with mixed chunks, to less than a chunk."""
    eagle = ("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", models["qwen3"])
    typed = ("--max-running-requests", "16384", "--batched-dp-moe-max-tokens", "256")
    answer = launch(*TP8, *LL, *eagle, *typed)
    assert answer["resolved"]["max_running_requests"] == 64 * 8
    answer = launch(*TP8, *LL, "--enable-mixed-chunk", *typed)
    assert answer["resolved"]["max_running_requests"] == 255 * 8


@pytest.mark.parametrize(
    "typed",
    [
        ("--max-running-requests", "0"),
        ("--max-total-tokens", "0"),
        ("--mem-fraction-static", "nan"),
    ],
)
def test_numbers_that_nothing_can_start_from_are_the_users(
    launch: Launch, typed: tuple[str, str]
) -> None:
    """Each under its own flag."""
    (error,) = launch(*TP8, *LL, *typed)["errors"]
    assert (error["got"], error["fix"]) == (" ".join(typed), f"unset {typed[0]}")


def test_a_draft_wider_than_t_is_one_reason(launch: Launch, models: dict[str, str]) -> None:
    """Not one for every value that follows from it."""
    eagle = ("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", models["qwen3"])
    wide = ("--speculative-num-steps", "7", "--speculative-eagle-topk", "8")
    drafts = ("--speculative-num-draft-tokens", "64", "--batched-dp-moe-max-tokens", "32")
    (error,) = launch(*TP8, *ON, *eagle, *wide, *drafts)["errors"]
    assert error["got"] == "one captured decode batch of 64 draft tokens per request"
    assert error["fix"] == "--batched-dp-moe-max-tokens 64"


def test_mistyped_draft_steps_are_the_users(launch: Launch, models: dict[str, str]) -> None:
    """They make a width of 0, which is refused as such."""
    eagle = ("--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", models["qwen3"])
    steps = ("--speculative-num-steps", "-1", "--speculative-eagle-topk", "1")
    (error,) = launch(*TP8, *ON, *eagle, *steps)["errors"]
    assert (error["limit"], error["fix"]) == ("speculative decoding", "--speculative-num-steps 1")


def test_leaving_names_what_would_select_deepep_again(launch: Launch) -> None:
    """The printed way out, typed as it stands, leaves."""
    deepep = ("--tp-size", "8", "--moe-a2a-backend", "deepep", "--enable-waterfill")
    (error,) = launch(*deepep, model="qwen3-gelu")["errors"]
    assert "--use-batched-dp-moe off" in error["fix"]
    assert error["fix"].endswith(", without --enable-waterfill")


def test_several_reasons_come_as_one_error(launch: Launch) -> None:
    """Not one per start."""
    answer = launch(
        *(*TP8, *ON, "--batched-dp-moe-max-tokens", "128", "--chunked-prefill-size", "8192"),
        *("--max-running-requests", "4096", "--enable-single-batch-overlap"),
    )
    assert answer["type"] == "ConfigError"
    assert "3 reasons" in answer["error"]
    assert [error["fix"] for error in answer["errors"]] == [
        "remove --enable-single-batch-overlap",
        "--chunked-prefill-size 1024",
        "--max-running-requests 1024",
    ]
