"""``moe-plugin``: exit codes, JSON that is only JSON, the host's own refusals, sweep, doctor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_plugin.planning.sweep import PROMPTS, TOKENS, Point, prefill_steps, rows, svg

TP8 = ("--tp-size", "8", "--attn-dp-size", "8")
FIELDS = {
    "capability", "max_dispatch_tokens_per_rank", "chunked_prefill_size", "max_running_requests",
    "cuda_graph_max_bs_decode", "resolved", "nvshmem_qp_depth", "rdma_buffer_bytes",
    "rdma_device_bytes", "workspace_bytes", "verdict", "errors",
}  # fmt: skip


def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MOE_", "SGLANG_"))}
    return subprocess.run(
        [sys.executable, "-P", "-m", "moe_plugin.cli.main", *arguments],
        capture_output=True,
        text=True,
        env={**environment, **env},
        cwd=cwd,
        timeout=300,
        check=False,
    )


def plan_json(*arguments: str, **env: str) -> tuple[int, dict[str, Any]]:
    """(exit code, the one JSON object on standard output)."""
    done = run("plan", "--json", *arguments, **env)
    return done.returncode, json.loads(done.stdout)


def test_plan_prints_only_json_and_every_field(models: dict[str, str]) -> None:
    """The contract of ``--json``; 0 means ok."""
    code, answer = plan_json("--model-path", models["deepseek-v3"], *TP8, "--use-batched-dp-moe=on")
    assert code == 0
    assert answer.keys() >= FIELDS
    assert answer["capability"]["use_batched_dp_moe"] is True
    assert answer["chunked_prefill_size"] == 2048
    assert answer["resolved"]["chunked_prefill_size"] == 256
    assert answer["rdma_buffer_bytes"] == 3_816_818_816
    assert answer["resolved"]["attention_backend"] == "fa3"  # chosen for a Hopper, not for a CPU
    assert answer["verdict"] == "ok"


def test_plan_refuses_with_two_and_says_what_to_type(models: dict[str, str]) -> None:
    """The plan is there as far as it got."""
    code, answer = plan_json(
        *("--model-path", models["deepseek-v3"], *TP8, "--use-batched-dp-moe", "on"),
        *("--chunked-prefill-size", "65536", "--batched-dp-moe-max-tokens", "512"),
    )
    assert code == 2
    assert answer["verdict"] == "refused"
    assert answer["max_dispatch_tokens_per_rank"] == 512
    (error,) = answer["errors"]
    assert error.keys() >= {"limit", "got", "allowed", "fix"}
    assert error["fix"] == "--chunked-prefill-size 4096"


def test_plan_reports_the_hosts_own_refusals(models: dict[str, str]) -> None:
    """With ``limit: host`` and its message."""
    code, answer = plan_json(
        *("--model-path", models["qwen3"], "--tp-size", "8", "--dp-size", "2"),
        *("--attn-dp-size", "2"),
    )
    assert code == 2
    assert answer["errors"][0]["limit"] == "host"
    assert "not supported" in answer["errors"][0]["fix"]


def test_plan_says_when_nothing_is_batched(models: dict[str, str]) -> None:
    """A plain launch is ok, with nothing bounded and the reason why."""
    code, answer = plan_json("--model-path", models["qwen3"])
    assert code == 0
    assert answer["capability"]["use_batched_dp_moe"] is False
    assert "not batched" in answer["capability"]["reason"]
    assert answer["max_running_requests"] is None


def test_plan_as_a_table(models: dict[str, str]) -> None:
    """Value, source, limit, head-room; bytes; verdict."""
    done = run("plan", "--model-path", models["qwen3-235b"], *TP8, "--use-batched-dp-moe", "on")
    assert done.returncode == 0
    for text in ("max_dispatch_tokens_per_rank", "default", "derived", "headroom", "verdict: ok",
                 "resolved by SGLang", "1.02 GiB"):  # fmt: skip
        assert text in done.stdout


def test_plan_for_another_device(models: dict[str, str]) -> None:
    """Ampere: another attention backend, our experts for FP8."""
    code, answer = plan_json(
        "--target", "a100", "--model-path", models["qwen3-fp8"], *TP8, "--use-batched-dp-moe", "on"
    )
    assert code == 0
    assert answer["runner"] == "moe_plugin"
    assert answer["resolved"]["attention_backend"] != "fa3"


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan",),
        ("plan", "--model-path", "x", "--no-such-flag"),
        ("plan", "--target", "abacus", "--model-path", "x"),
        ("plan", "--model-path", "x", "--batched-dp-moe-max-tokens", "0"),
        ("doctor", "--no-such-flag"),
        ("no-such-command",),
        (),
    ],
)
def test_bad_usage_is_one(arguments: tuple[str, ...]) -> None:
    """Also where argparse says 2, which would read as "refused"."""
    done = run(*arguments)
    assert done.returncode == 1
    assert "error" in done.stderr
    assert done.stdout == ""


def test_help_needs_neither_torch_nor_sglang(tmp_path: Path) -> None:
    """And lists the commands: here with modules of those names that cannot be imported."""
    for name in ("torch", "sglang", "triton"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    done = run("--help", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("plan", "doctor", "tune"))


def test_sweep_trades_steps_against_bytes(models: dict[str, str], tmp_path: Path) -> None:
    """A row per T, resolved by the host each time, and a plot."""
    done = run(
        *("plan", "--sweep", "s.svg", "--json", "--model-path", models["deepseek-v3"], *TP8),
        *("--use-batched-dp-moe", "on", "--batched-dp-moe-max-tokens", "64"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    assert [point["tokens"] for point in points] == list(TOKENS)
    steps = [point["steps"][str(PROMPTS[-1])] for point in points]
    assert steps == sorted(steps, reverse=True)
    buffers = [point["buffer_bytes"] for point in points]
    assert buffers == sorted(buffers)
    assert (tmp_path / "s.svg").read_text().startswith("<svg")


def test_sweep_pieces() -> None:
    """Pure arithmetic and a plot that also works without a single point."""
    assert prefill_steps(256, 1) == (4, 32, 128)
    assert prefill_steps(256, 8) == (1, 4, 16)
    refused = Point(8, (1, 2, 3), 0, 0, 0, 0, None, "host")
    assert rows([refused])[1][-1] == "host"
    assert "<polyline" not in svg([refused], "none")


def test_doctor_tells_by_its_exit_code() -> None:
    """Active here; excluded by SGLANG_PLUGINS; switched off."""
    done = run("doctor", "--quick", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    named = {finding["name"]: finding for finding in report["findings"]}
    assert named["sglang"]["text"].startswith("0.5.")
    assert named["status"]["text"] == "active"
    assert named["server_args.ServerArgs.add_cli_args"]["state"] == "ok"
    assert "deepep" in named["backends"]["text"]
    assert run("doctor", "--quick", SGLANG_PLUGINS="other").returncode == 2
    done = run("doctor", "--quick", MOE_PLUGIN_DISABLE="1")
    assert done.returncode == 2
    assert "MOE_PLUGIN_DISABLE is set" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires an NVIDIA GPU")
def test_live_plan_equals_the_named_devices(models: dict[str, str]) -> None:
    """On a device of the table, resolution with nothing overridden gives the same plan."""
    torch = pytest.importorskip("torch")
    from moe_plugin.integration.commands.target_device import TARGETS

    names = {target.name: key for key, target in TARGETS.items()}
    found = torch.cuda.get_device_name(0)
    if found not in names:
        pytest.skip(reason=f"requires one of {sorted(names)}, got {found}")
    launch = ("--model-path", models["deepseek-v3"], "--use-batched-dp-moe", "on")
    live, named = (plan_json("--target", key, *launch) for key in ("local", names[found]))
    assert live == named
