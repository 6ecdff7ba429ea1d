"""What ``moe-plugin plan`` blames, what it leaves out, and that no machine shows through."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.commands import plan_json, run

TP8 = ("--tp-size", "8", "--attn-dp-size", "8")
ON = (*TP8, "--use-batched-dp-moe", "on")
LL = (*TP8, "--moe-a2a-backend", "deepep", "--deepep-mode", "low_latency")
WITHOUT = "This server starts without it, and nothing bounds its batches"


# The host's own checks, and whose error it is.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--nnodes", "3"), "divisible by number of nodes"),
        (("--moe-dense-tp-size", "4"), "moe_dense_tp_size only supports"),
        (("--served-model-name", "a:b"), "cannot contain a colon"),
    ],
)
def test_the_launchers_last_checks_refuse_too(
    models: dict[str, str], flags: tuple[str, ...], words: str
) -> None:
    """The server would end there, after an argument resolution that went well."""
    code, answer = plan_json("--model-path", models["deepseek-v3"], *ON, *flags)
    assert code == 2
    (error,) = answer["errors"]
    assert error["limit"] == "host"
    assert words in error["got"]
    assert "SGLang 0.5." in error["allowed"]
    assert answer["max_dispatch_tokens_per_rank"] == 256  # the plan is there as far as it got


def test_a_draft_of_no_tokens_is_refused_by_its_flag(models: dict[str, str]) -> None:
    """And the fix works: a typing error, not a division by zero in the planner."""
    speculative = ("--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", "1")
    launch = ("--model-path", models["deepseek-v3"], *ON, *speculative)
    code, answer = plan_json(*launch, "--speculative-num-steps", "-1")
    assert code == 2
    (error,) = answer["errors"]
    assert error["changes"] == [["--speculative-num-steps", "1"]]
    assert "--speculative-num-steps -1, which makes 0 rows" in error["got"]
    assert plan_json(*launch, "--speculative-num-steps", "1")[0] == 0


def test_a_crash_of_ours_is_not_the_hosts(models: dict[str, str]) -> None:
    """It has an exit code of its own, says what it is and asks for a report; JSON stays JSON."""
    program = Path(__file__).with_name("failing_plan.py")
    done = subprocess.run(
        [sys.executable, "-P", program, "plan", "--json", "--model-path", models["qwen3"], *ON],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 3
    said = json.loads(done.stdout)
    assert said["verdict"] == "internal error"
    assert "ZeroDivisionError" in said["error"]
    assert re.search(r"\(moe_plugin/\w+/\w+\.py:\d+\)", said["error"])  # where
    assert "Please report it" in done.stderr
    assert "Traceback" not in done.stderr  # with --verbose


def test_a_crash_of_the_hosts_says_where(models: dict[str, str]) -> None:
    """A quantization config that is a word: the host takes it for an object."""
    override = json.dumps({"quantization_config": "fp8"})
    code, answer = plan_json(
        "--model-path", models["qwen3"], "--json-model-override-args", override
    )
    assert code == 2
    (error,) = answer["errors"]
    assert error["limit"] == "host"
    assert "a crash of SGLang's own: AttributeError: 'str' object has no attribute" in error["got"]
    assert "model_config.py:" in error["got"]
    assert error["allowed"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("absent.yaml", None, "absent.yaml"),
        ("broken.yaml", "tp-size: [8\n  a: b: c\n", "broken.yaml"),
        ("list.yaml", "- tp-size\n", "dictionary"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_bad_usage(
    models: dict[str, str], tmp_path: Path, name: str, text: str | None, words: str
) -> None:
    """One line that names the file, not a traceback."""
    if text is not None:
        (tmp_path / name).write_text(text)
    done = run("plan", "--model-path", models["qwen3"], "--config", name, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# The plugin is in the plan as it would be in the server.


@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"SGLANG_PLUGINS": "other"}, "SGLANG_PLUGINS=other leaves moe_plugin out"),
        ({"MOE_PLUGIN_DISABLE": "1"}, "moe_plugin is disabled: MOE_PLUGIN_DISABLE is set"),
    ],
)
def test_a_server_without_us_is_planned_without_us(
    models: dict[str, str], env: dict[str, str], why: str
) -> None:
    """It starts, as the stock host; so the answer is ok, and says that nothing is bounded."""
    code, answer = plan_json("--model-path", models["deepseek-v3"], *LL, **env)
    assert code == 0
    assert answer["capability"]["use_batched_dp_moe"] is False
    assert answer["capability"]["reason"] == f"{why}. {WITHOUT}"
    assert answer["resolved"]["chunked_prefill_size"] > 256  # the host's own
    assert f"{why}. {WITHOUT}" in answer["text"]


@pytest.mark.parametrize(
    ("variable", "allowed"),
    [("MOE_PLUGIN_TRANSPORT", "auto, deepep, torch"), ("MOE_PLUGIN_MIXED_CHUNKS", "1 or 0")],
)
def test_a_mistyped_variable_of_ours_is_one_refusal(
    models: dict[str, str], variable: str, allowed: str
) -> None:
    """With what it may be, and the variable that fixes it."""
    code, answer = plan_json("--model-path", models["qwen3"], *ON, **{variable: "maybe"})
    assert code == 2
    (error,) = answer["errors"]
    assert (error["limit"], error["got"], error["allowed"]) == (variable, "'maybe'", allowed)
    assert error["fix"] == f"unset {variable}"


def test_our_flags_on_a_server_without_us_are_unknown(models: dict[str, str]) -> None:
    """As they are to that server, and the variable is to blame."""
    done = run("plan", "--model-path", models["qwen3"], *ON, SGLANG_PLUGINS="other")
    assert done.returncode == 1
    assert "unrecognized arguments: --use-batched-dp-moe on" in done.stderr
    assert "SGLANG_PLUGINS=other leaves moe_plugin out" in done.stderr
    assert len(done.stderr.splitlines()) == 1  # without the host's usage of 500 lines


def test_what_the_host_logs_is_kept_apart(models: dict[str, str]) -> None:
    """Its lines come with --verbose, on standard error; the answer is the same."""
    launch = ("plan", "--json", "--model-path", models["deepseek-v3"], *ON)
    quiet, verbose = run(*launch), run(*launch, "--verbose")
    assert quiet.stderr == ""
    assert "DP attention is enabled" in verbose.stderr
    assert json.loads(quiet.stdout) == json.loads(verbose.stdout)


def test_why_a_launch_was_left_alone_is_in_the_answer(models: dict[str, str]) -> None:
    """Not in a log that nobody sees."""
    code, answer = plan_json("--model-path", models["deepseek-v3"], *LL, "--use-ray")
    assert code == 0
    assert answer["capability"]["use_batched_dp_moe"] is False
    assert "--use-ray" in answer["capability"]["reason"]
    assert "--use-ray" in answer["text"]


# No fact of the planning machine shows in a plan for another device.

BAD_PACKAGE = "raise OSError('libcuda.so.1: cannot open shared object file')\n"
OTHER_DRIVER = """
def nvmlInit(): ...
def nvmlShutdown(): ...
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetCudaComputeCapability(handle): return (8, 0)
"""


def test_any_machine_gives_the_same_plan(models: dict[str, str], tmp_path: Path) -> None:
    """Here one with another GPU's driver and tools, packages that do not import, a CPU engine
    and an out-of-tree platform switched on, and no device visible."""
    for package in ("sgl_kernel", "deep_gemm", "deep_ep", "flashinfer"):
        (tmp_path / f"{package}.py").write_text(BAD_PACKAGE)
    (tmp_path / "pynvml.py").write_text(OTHER_DRIVER)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 16384\n")
    tool.chmod(0o755)
    launch = ("--target", "h200", "--model-path", models["deepseek-v3"], *ON)
    plain = plan_json(*launch)
    other = plan_json(
        *launch,
        PYTHONPATH=str(tmp_path),
        PATH=f"{tmp_path}:/usr/bin:/bin",
        CUDA_VISIBLE_DEVICES="",
        SGLANG_USE_CPU_ENGINE="1",
        SGLANG_PLATFORM="moe_plugin_cpu",
    )
    assert plain == other
    assert plain[1]["resolved"]["attention_backend"] == "fa3"
    assert plain[1]["memory"]["device_bytes"] == 143771 << 20  # not the 16 GiB of that tool


def test_formats_that_the_host_registers_for_a_device(tmp_path: Path) -> None:
    """MXFP4 exists on CUDA only, by a registry that the host fills while it is imported."""
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880,
        "intermediate_size": 2880, "num_hidden_layers": 4, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128,
        "num_experts_per_tok": 4, "sliding_window": 128, "vocab_size": 1024,
        "max_position_embeddings": 131072, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, answer = plan_json("--model-path", str(tmp_path), *ON)
    assert code == 2
    limits = {error["limit"] for error in answer["errors"]}
    assert "host" not in limits  # which would not know the format
    assert any("GptOssForCausalLM" in error["got"] for error in answer["errors"])


@pytest.mark.parametrize(
    ("devices", "code"), [("mlx5_7,mlx5_8", 0), ('{"0": "mlx5_7", "1": "mlx5_8"}', 0), (",", 2)]
)
def test_devices_and_keys_of_the_target_need_not_be_here(
    models: dict[str, str], devices: str, code: int
) -> None:
    """InfiniBand devices are held against their form alone; TLS keys lie on the target."""
    done, answer = plan_json(
        *("--model-path", models["deepseek-v3"], *LL, "--disaggregation-mode", "decode"),
        *("--disaggregation-ib-device", devices),
        *("--ssl-keyfile", "/etc/tls/none.key", "--ssl-certfile", "/etc/tls/none.crt"),
    )
    assert done == code, answer["errors"]
    if code:
        assert "IB device" in answer["errors"][0]["got"]


# One number, explained.


def test_explain_one_budget(models: dict[str, str]) -> None:
    """By name, by flag or by part; what it follows from; what the host makes of it."""
    launch = ("plan", "--model-path", models["deepseek-v3"], *ON)
    done = run(*launch, "--explain", "chunked-prefill-size")
    assert done.returncode == 0
    for text in (
        "chunked_prefill_size = 2048, follows from other values",
        "arithmetic: 2048 /",
        "limit that binds: <= 2048 (T x attention TP x DP); nothing is left below it",
        "T: 256 tokens per rank, a default",
        "SGLang ends with: 256",
        "set it with: --chunked-prefill-size",
    ):
        assert text in done.stdout
    told = json.loads(run(*launch, "--json", "--explain", "running").stdout)["explain"]
    assert told["name"] == "max_running_requests"
    assert told["follows_from"]["value"] == 256
    done = run(*launch, "--explain", "workspace_bytes")
    assert re.match(r"workspace_bytes = \d+ \(\d\.\d\d GiB\), of one rank's memory:", done.stdout)
    assert "kv_cache_bytes = " in done.stdout
    done = run(*launch, "--explain", "cuda_graph")
    assert done.returncode == 1
    assert "cuda_graph_max_bs_decode" in done.stderr
