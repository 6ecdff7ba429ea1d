"""The plugin inside the real host's processes: discovery, flags, kill switch, drift."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.hosts import host_result, program, run_host
from ..support.resolving import LL
from ..support.serving.checkpoint import write_checkpoint
from ..support.serving.server import COMMON_ARGS, TWO_EP_RANKS

RESOLVED = program("resolved_arguments")
PARSED = program("parsed_arguments")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint; only its config.json matters here."""
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def _argv(model: Path, *more: str) -> list[str]:
    return ["--model-path", str(model), *COMMON_ARGS, *TWO_EP_RANKS, *more]


def test_flags_reach_resolution_and_the_environment(model: Path) -> None:
    """`on` selects deepep and low latency, budgets follow T, workers inherit the capacity."""
    argv = _argv(model, "--use-batched-dp-moe", "on", "--batched-dp-moe-max-tokens", "64")
    got = host_result(RESOLVED, argv)
    assert (got["a2a"], got["mode"], got["capacity"]) == ("deepep", "low_latency", "64")
    assert got["plan"]["max_dispatch_tokens_per_rank"] == 64
    assert got["plan"]["chunked_prefill_size"] == 64 * 2
    assert got["chunk"] == 64  # the host divided it by attention DP
    assert got["running"] == 64 * 2


@pytest.mark.parametrize(("value", "batched"), [("true", True), ("false", False)])
def test_yaml_config_booleans(model: Path, tmp_path: Path, value: str, batched: bool) -> None:
    """In a --config file true and false mean on and off."""
    config = tmp_path / "server.yaml"
    config.write_text(f"use-batched-dp-moe: {value}\nbatched-dp-moe-max-tokens: 32\n")
    got = host_result(RESOLVED, _argv(model, "--config", str(config)))
    assert (got["plan"] is not None) == batched
    assert (got["a2a"] == "deepep") == batched


def test_engine_without_a_command_line(model: Path) -> None:
    """`sglang.Engine` builds ServerArgs from keywords: the variables stand in for the flags."""
    env = {"MOE_PLUGIN_USE_BATCHED_DP_MOE": "on", "MOE_PLUGIN_MAX_TOKENS": "96"}
    assert host_result(program("keyword_arguments"), str(model), env=env) == 96


def test_flags_are_in_the_help() -> None:
    """Wherever the host loads plugins before it prints its help."""
    done = run_host(PARSED, ["--help"])
    assert done.returncode == 0
    assert "--use-batched-dp-moe {auto,on,off}" in done.stdout
    assert "--batched-dp-moe-max-tokens N" in done.stdout


def test_excluded_and_disabled_plugins_leave_the_host_as_it_was(model: Path) -> None:
    """SGLANG_PLUGINS without us, and the kill switch, resolve exactly like the stock host."""
    argv = _argv(model, *LL)
    excluded = host_result(RESOLVED, argv, env={"SGLANG_PLUGINS": "moe_plugin_cpu"})
    disabled = host_result(RESOLVED, argv, env={"MOE_PLUGIN_DISABLE": "1"})
    off = host_result(RESOLVED, [*argv, "--use-batched-dp-moe", "off"])
    active = host_result(RESOLVED, argv)
    assert excluded["plan"] is None
    assert excluded["all"] == disabled["all"] == off["all"]
    assert active["plan"] is not None  # auto acts: the resolved configuration is batched
    assert active["all"] != excluded["all"]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SGLANG_PLUGINS": "moe_plugin_cpu"}, "unrecognized arguments: --use-batched-dp-moe on"),
        ({"MOE_PLUGIN_DISABLE": "1"}, "moe_plugin is disabled: MOE_PLUGIN_DISABLE is set. Fix:"),
        (
            {"MOE_PLUGIN_DISABLE": "perhaps"},
            "moe_plugin is unsupported: MOE_PLUGIN_DISABLE: got 'perhaps', allowed 1 or 0. "
            "Fix: unset MOE_PLUGIN_DISABLE",
        ),
    ],
)
def test_on_without_the_plugin_refuses_to_start(model: Path, env: dict, message: str) -> None:
    """If the user asked for us and we did not get in, there is no unprotected server."""
    argv = _argv(model, "--use-batched-dp-moe", "on")
    done = run_host(PARSED, argv, env=env)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


DRIFTED = program("drifted_host")


@pytest.mark.parametrize("change", ["renamed", "re-signed", "version"])
def test_drift_leaves_the_host_untouched(change: str) -> None:
    """auto: one clear line, no resolution hook; the flag still parses."""
    state, reasons, resolution_hooks = host_result(DRIFTED, change, "auto")
    assert state == "unsupported"
    assert resolution_hooks == 0
    assert len(reasons) == 1
    assert ("0.4.9" if change == "version" else "declare_resolution") in reasons[0]


def test_drift_with_on_refuses() -> None:
    """on: the same reason, as an error."""
    done = run_host(DRIFTED, "renamed", "on")
    assert done.returncode != 0
    assert "HostMismatchError" in done.stderr
    assert "declare_resolution is missing" in done.stderr


def test_every_touched_symbol_is_as_expected() -> None:
    """The table of host symbols, runtime ones included, against the installed host."""
    assert host_result(program("host_symbol_problems")) == []


def test_arguments_resolved_without_us_are_refused_at_the_point_of_use(model: Path) -> None:
    """Embedders can resolve before plugins load; the scheduler then refuses to run unbounded."""
    argv = _argv(model, *LL)
    name, text = host_result(program("plugins_after_resolution"), argv)
    assert name == "UnsupportedError"
    assert "arguments resolved without the plugin" in text
    assert "--use-batched-dp-moe off" in text


@pytest.mark.parametrize(
    ("chunk", "env", "answer"),
    [
        ("256", {}, None),
        ("256", {"MOE_PLUGIN_USE_BATCHED_DP_MOE": "on"}, "UnsupportedError"),
        ("272", {}, "UnsupportedError"),
        ("272", {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "136"}, None),
    ],
)
def test_arguments_tuned_by_hand_without_us_still_work(
    model: Path, chunk: str, env: dict[str, str], answer: str | None
) -> None:
    """Whoever resolves before plugins load, and fits the host's own buffer, needs none of us.

    Two DP groups share a chunk; the host's buffer holds 128 rows of a rank by default.
    """
    argv = _argv(model, *LL)
    argv += ["--chunked-prefill-size", chunk, "--max-running-requests", "64"]
    env = {"MOE_PLUGIN_TRANSPORT": "deepep", **env}  # torch on a CPU, of which no host knows
    assert host_result(program("guarded_by_hand"), argv, env=env) == answer


def test_drift_in_model_code_leaves_auto_alone_and_refuses_on(model: Path) -> None:
    """auto resolves as the stock host; on raises with the reason, before any weights."""
    argv = _argv(model, *LL)
    drifted = program("drifted_model_code")
    assert host_result(drifted, argv) == [None, "off", None]
    done = run_host(drifted, [*argv, "--use-batched-dp-moe", "on"])
    assert done.returncode != 0
    assert "HostMismatchError" in done.stderr
    assert "run_moe_core takes ['self', 'outcome']" in done.stderr


def test_a_scheduler_without_our_experts_refuses_a_planned_launch(model: Path) -> None:
    """The launcher planned, but this process could not load the plugin."""
    argv = _argv(model, "--use-batched-dp-moe", "on")
    name, text = host_result(program("planned_without_experts"), argv)
    assert name == "HostMismatchError"
    assert "planned by moe_plugin, which is unsupported in this process: sglang 9.9.9" in text
