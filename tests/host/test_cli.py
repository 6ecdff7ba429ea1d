"""``moe-plugin``: exit codes, JSON that is only JSON, the host's own refusals, sweep, doctor."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from moe_plugin.cli import tables
from moe_plugin.errors import UnsupportedError
from moe_plugin.integration.commands import machine_facts
from moe_plugin.integration.commands.doctor_launch import judge
from moe_plugin.planning.sweep import PROMPTS, TOKENS, Point, plot, prefill_steps, rows

from ..support.commands import plan_json, run

TP8 = ("--tp-size", "8", "--attn-dp-size", "8")
FIELDS = {
    "capability", "max_dispatch_tokens_per_rank", "chunked_prefill_size", "max_running_requests",
    "cuda_graph_max_bs_decode", "resolved", "nvshmem_qp_depth", "rdma_buffer_bytes",
    "rdma_device_bytes", "workspace_bytes", "verdict", "errors",
}  # fmt: skip


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
    assert "not supported" in answer["errors"][0]["got"]


def test_plan_says_when_nothing_is_batched(models: dict[str, str]) -> None:
    """A plain launch is ok, with nothing bounded and the reason why."""
    code, answer = plan_json("--model-path", models["qwen3"])
    assert code == 0
    assert answer["capability"]["use_batched_dp_moe"] is False
    assert "not batched" in answer["capability"]["reason"]
    assert answer["max_running_requests"] is None


def test_plan_as_a_table(models: dict[str, str]) -> None:
    """Value, source, limit, head-room; bytes; verdict."""
    argv = ("--model-path", models["qwen3-235b"], *TP8, "--use-batched-dp-moe", "on")
    done = run("plan", *argv, "--batched-dp-moe-max-tokens", "256")
    assert done.returncode == 0
    for text in ("max_dispatch_tokens_per_rank", "user", "derived", "headroom", "verdict: ok",
                 "resolved by SGLang", "1.02 GiB", "(config.json)", "KV cache",
                 "prefill steps of a prompt alone, by its tokens: 1024: 4"):  # fmt: skip
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
    assert "<svg" in (tmp_path / "s.svg").read_text()


def test_sweep_pieces(tmp_path: Path) -> None:
    """Pure arithmetic and a plot that also works without a single point."""
    assert prefill_steps(256, 1) == (4, 32, 128)
    assert prefill_steps(256, 8) == (1, 4, 16)
    refused = Point(8, (1, 2, 3), 0, 0, 0, 0, None, "host")
    assert rows([refused])[1][-1] == "host"
    good = [Point(t, prefill_steps(t, 1), 8 * t, t << 20, t << 20, 1, 0.8, "ok") for t in (64, 128)]
    plot([refused], "none", tmp_path / "none.svg")
    plot([refused, *good], "some", tmp_path / "some.svg")
    none, some = ((tmp_path / f"{name}.svg").read_text() for name in ("none", "some"))
    for colour in ("#d62728", "#1f77b4"):  # steps and bytes, each a curve
        assert f"stroke: {colour}; stroke-width" in some
        assert f"stroke: {colour}; stroke-width" not in none
    assert "<!-- 128 -->" in some  # T of a point, on the axis


def test_plots_without_matplotlib_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The library is optional, and so is the plot."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match="pip install matplotlib, or --sweep without"):
        plot([], "none", tmp_path / "none.svg")


def test_sweep_refuses_a_plot_that_it_cannot_write(models: dict[str, str]) -> None:
    """Before the launch is resolved once per T."""
    for path in ("s.docx", "no/such/folder/s.svg"):
        done = run("plan", "--sweep", path, "--model-path", models["qwen3"])
        assert done.returncode == 1
        assert f"plot of a sweep: got {path}" in done.stderr


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


def test_doctor_judges_a_launch(models: dict[str, str]) -> None:
    """Whether this very command would be protected, and why not; in the exit code too."""
    launch = ("--launch", "sglang", "serve", models["deepseek-v3"], *TP8, "--moe-a2a-backend",
              "deepep", "--deepep-mode", "low_latency",
              "--batched-dp-moe-max-tokens", "256")  # fmt: skip
    options = ("doctor", "--quick", "--json", "--target", "h200")
    done = run(*options, *launch)
    report = json.loads(done.stdout)
    assert done.returncode == 0, report
    assert report["launch"]["protected"] is True
    tokens = report["launch"]["plan"]["max_dispatch_tokens_per_rank"]
    assert f"at most {tokens} tokens per rank on deepep" in report["launch"]["why"]
    assert report["launch"]["plan"]["verdict"] == "ok"
    done = run(*options, *launch, "--no-such-flag")
    assert done.returncode == 2
    verdict = json.loads(done.stdout)["launch"]
    assert verdict["protected"] is False
    assert verdict["why"] == "it does not start: unrecognized arguments: --no-such-flag"


def test_a_launch_that_is_not_protected_says_why(models: dict[str, str]) -> None:
    """Switched off; refused before weights load."""
    launch = ["--model-path", models["deepseek-v3"], *TP8]
    off = judge([*launch, "--use-batched-dp-moe", "off"], "h100")
    assert (off.protected, off.why) == (False, "--use-batched-dp-moe off")
    more = ("--chunked-prefill-size", "65536", "--batched-dp-moe-max-tokens", "512")
    refused = judge([*launch, "--use-batched-dp-moe", "on", *more], "h100")
    assert refused.protected is False
    assert refused.why.startswith("refused before weights load: ")
    assert refused.why.endswith("Fix: --chunked-prefill-size 4096")


def test_doctor_reads_rdma_devices(tmp_path: Path) -> None:
    """Ports with state and rate, the modules and driver settings that DeepEP needs of a node."""
    port = tmp_path / "sys/class/infiniband/mlx5_0/ports/1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (port / "link_layer").write_text("InfiniBand\n")
    driver = tmp_path / "proc/driver/nvidia"
    driver.mkdir(parents=True)
    (driver / "params").write_text("EnableStreamMemOPs: 1\nOther: 2\n")
    (tmp_path / "proc/modules").write_text("gdrdrv 1 0\nnvidia_uvm 2 0\n")
    found = {finding.name: finding.text for finding in machine_facts.rdma(tmp_path)}
    assert found == {
        "RDMA": "mlx5_0/1 ACTIVE 400 Gb/sec (4X NDR) InfiniBand",
        "nvidia_peermem": "not loaded",
        "gdrdrv": "loaded",
        "driver settings": "EnableStreamMemOPs: 1",
    }


def test_doctor_shows_variables_of_the_transports_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An issue must not carry keys and passwords."""
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", "1024")
    monkeypatch.setenv("SGLANG_API_KEY", "secret")
    shown = {finding.name for finding in machine_facts.system() if finding.area == "environment"}
    assert "NVSHMEM_QP_DEPTH" in shown
    assert "SGLANG_API_KEY" not in shown


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_tables_are_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain columns in a pipe and without rich; on a terminal as wide as that is."""
    pytest.importorskip("rich")
    cells = [("name", "found"), ("buffer", "word " * 30), ("[red]", "x")]
    assert tables.table_for(io.StringIO())(cells).splitlines()[0] == "name    found"
    monkeypatch.setenv("COLUMNS", "60")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", tables.table_for(_Terminal())(cells))
    assert max(map(len, shown.splitlines())) <= 60
    assert shown.count("word") == 30
    assert "[red]" in shown  # text, not markup
    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    assert tables.table_for(_Terminal())(cells).splitlines()[0] == "name    found"


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
