"""The plugin inside the real host's processes: discovery, flags, kill switch, drift."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.hosts import host_result, run_host
from ..support.resolving import LL
from ..support.serving.checkpoint import write_checkpoint
from ..support.serving.server import COMMON_ARGS, TWO_EP_RANKS

PREPARE = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import prepare_server_args
"""
RESOLVED = (
    PREPARE
    + """
import sys, os
args = prepare_server_args({argv!r})
args.resolve_once()
from sglang.srt.arg_groups.model_override_base import resolving_view
cfg = resolving_view(args)
plan = getattr(args, "_moe_plugin_plan", None)
emit({{
    "a2a": cfg.moe_a2a_backend, "mode": cfg.deepep_mode, "chunk": cfg.chunked_prefill_size,
    "running": cfg.max_running_requests,
    "plan": plan.as_dict() if plan else None,
    "capacity": os.environ.get("SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"),
    "all": repr(sorted((k, v) for k, v in args.resolved_dict().items()
                       if k not in ("port", "nccl_port"))),
}})
"""
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint; only its config.json matters here."""
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def _argv(model: Path, *more: str) -> list[str]:
    return ["--model-path", str(model), *COMMON_ARGS, *TWO_EP_RANKS, *more]


def test_flags_reach_resolution_and_the_environment(model: Path) -> None:
    """`on` selects deepep and low latency, budgets follow T, workers inherit the capacity."""
    argv = _argv(model, "--use-batched-dp-moe", "on", "--batched-dp-moe-max-tokens", "64")
    got = host_result(RESOLVED.format(argv=argv))
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
    got = host_result(RESOLVED.format(argv=_argv(model, "--config", str(config))))
    assert (got["plan"] is not None) == batched
    assert (got["a2a"] == "deepep") == batched


def test_engine_without_a_command_line(model: Path) -> None:
    """`sglang.Engine` builds ServerArgs from keywords: the variables stand in for the flags."""
    code = (
        "from sglang.srt.plugins import load_plugins\nload_plugins()\n"
        "from sglang.srt.server_args import ServerArgs\n"
        f"args = ServerArgs(model_path={str(model)!r}, device='cpu', tp_size=2, attn_dp_size=2,\n"
        "    ep_size=2, enable_dp_lm_head=True,\n"
        "    dtype='float32', attention_backend='torch_native')\n"
        "args.resolve_once()\n"
        "import pickle\n"
        "child = pickle.loads(pickle.dumps(args))\n"
        "emit(child._moe_plugin_plan.max_dispatch_tokens_per_rank)\n"
    )
    env = {"MOE_PLUGIN_USE_BATCHED_DP_MOE": "on", "MOE_PLUGIN_MAX_TOKENS": "96"}
    assert host_result(code, env=env) == 96


def test_flags_are_in_the_help() -> None:
    """Wherever the host loads plugins before it prints its help."""
    done = run_host(PREPARE + "prepare_server_args(['--help'])")
    assert done.returncode == 0
    assert "--use-batched-dp-moe {auto,on,off}" in done.stdout
    assert "--batched-dp-moe-max-tokens N" in done.stdout


def test_excluded_and_disabled_plugins_leave_the_host_as_it_was(model: Path) -> None:
    """SGLANG_PLUGINS without us, and the kill switch, resolve exactly like the stock host."""
    argv = _argv(model, *LL)
    code = RESOLVED.format(argv=argv)
    excluded = host_result(code, env={"SGLANG_PLUGINS": "moe_plugin_cpu"})
    disabled = host_result(code, env={"MOE_PLUGIN_DISABLE": "1"})
    off = host_result(RESOLVED.format(argv=[*argv, "--use-batched-dp-moe", "off"]))
    active = host_result(code)
    assert excluded["plan"] is None
    assert excluded["all"] == disabled["all"] == off["all"]
    assert active["plan"] is not None  # auto acts: the resolved configuration is batched
    assert active["all"] != excluded["all"]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SGLANG_PLUGINS": "moe_plugin_cpu"}, "unrecognized arguments: --use-batched-dp-moe on"),
        ({"MOE_PLUGIN_DISABLE": "1"}, "moe_plugin is disabled: MOE_PLUGIN_DISABLE is set. Fix:"),
    ],
)
def test_on_without_the_plugin_refuses_to_start(model: Path, env: dict, message: str) -> None:
    """If the user asked for us and we did not get in, there is no unprotected server."""
    argv = _argv(model, "--use-batched-dp-moe", "on")
    done = run_host(PREPARE + f"prepare_server_args({argv!r})", env=env)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


DRIFT = """
import sglang.srt.server_args
import sglang.srt.arg_groups.overrides as overrides
{change}
from moe_plugin.integration import plugin
from moe_plugin.integration.status import STATUS
plugin.register()
plugin.register()  # idempotent
from sglang.srt.plugins.hook_registry import HookRegistry
HookRegistry.apply_hooks()
from sglang.srt.server_args import prepare_server_args
from sglang.srt.arg_groups import resolution_hooks
args = prepare_server_args(["--model-path", "none", "--use-batched-dp-moe", "{switch}"])
emit([STATUS.state, STATUS.reasons, len(resolution_hooks._HOOKS)])
"""
CHANGES = {
    "renamed": "overrides.declare = overrides.declare_resolution; del overrides.declare_resolution",
    "re-signed": "overrides.declare_resolution = lambda record, **fields: None",
    "version": "import moe_plugin.integration.host_symbols as h; h.host_version = lambda: '0.4.9'",
}


@pytest.mark.parametrize("change", CHANGES)
def test_drift_leaves_the_host_untouched(change: str) -> None:
    """auto: one clear line, no resolution hook; the flag still parses."""
    code = DRIFT.format(change=CHANGES[change], switch="auto")
    state, reasons, resolution_hooks = host_result(code)
    assert state == "unsupported"
    assert resolution_hooks == 0
    assert len(reasons) == 1
    assert ("0.4.9" if change == "version" else "declare_resolution") in reasons[0]


def test_drift_with_on_refuses() -> None:
    """on: the same reason, as an error."""
    done = run_host("def emit(x): pass\n" + DRIFT.format(change=CHANGES["renamed"], switch="on"))
    assert done.returncode != 0
    assert "HostMismatchError" in done.stderr
    assert "declare_resolution is missing" in done.stderr


def test_every_touched_symbol_is_as_expected() -> None:
    """The table of host symbols, runtime ones included, against the installed host."""
    code = (
        "from moe_plugin.integration import host_symbols\n"
        "emit(host_symbols.problems(runtime=True))\n"
    )
    assert host_result(code) == []


def test_arguments_resolved_without_us_are_refused_at_the_point_of_use(model: Path) -> None:
    """Embedders can resolve before plugins load; the scheduler then refuses to run unbounded."""
    argv = _argv(model, *LL)
    code = f"""
from sglang.srt.server_args import prepare_server_args
import sglang.srt.managers.scheduler as scheduler
args = prepare_server_args({argv!r})
args.resolve_once()
from sglang.srt.plugins import load_plugins
load_plugins()
try:
    scheduler.Scheduler(args, None)
except Exception as error:
    emit([type(error).__name__, str(error)])
"""
    name, text = host_result(code)
    assert name == "UnsupportedError"
    assert "arguments resolved without the plugin" in text
    assert "--use-batched-dp-moe off" in text


BY_HAND = """
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args({argv!r})
args.resolve_once()
from moe_plugin.integration.serve import start_guard as guard
try:
    emit(guard.before_scheduler_init(None, args))
except Exception as error:
    emit(type(error).__name__)
"""


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
    assert host_result(BY_HAND.format(argv=argv), env=env) == answer


# The host's model code drifts: nothing of it is looked at before a plan is about to be made.
MODEL_DRIFT = """
from sglang.srt.plugins import load_plugins
load_plugins()
import sglang.srt.layers.moe.ep_moe.layer as layer
layer.DeepEPMoE.run_moe_core = lambda self, outcome: None
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args({argv!r})
"""


def test_drift_in_model_code_leaves_auto_alone_and_refuses_on(model: Path) -> None:
    """auto resolves as the stock host; on raises with the reason, before any weights."""
    argv = _argv(model, *LL)
    auto = MODEL_DRIFT.format(argv=argv) + (
        "args.resolve_once()\n"
        "from sglang.srt.arg_groups.model_override_base import resolving_view\n"
        "from moe_plugin.integration import flags\n"
        "emit([args._moe_plugin_plan, flags.requested(args).switch,\n"
        "      resolving_view(args).max_running_requests])\n"
    )
    assert host_result(auto) == [None, "off", None]
    on = MODEL_DRIFT.format(argv=[*argv, "--use-batched-dp-moe", "on"])
    done = run_host(on + "args.resolve_once()")
    assert done.returncode != 0
    assert "HostMismatchError" in done.stderr
    assert "run_moe_core takes ['self', 'outcome']" in done.stderr


def test_a_scheduler_without_our_experts_refuses_a_planned_launch(model: Path) -> None:
    """The launcher planned, but this process could not load the plugin."""
    argv = _argv(model, "--use-batched-dp-moe", "on")
    code = (
        PREPARE
        + f"""
args = prepare_server_args({argv!r})
args.resolve_once()
import sglang.srt.managers.scheduler as scheduler
from moe_plugin.integration import host_symbols as hosts, plugin
from moe_plugin.integration.status import STATUS
from sglang.srt.plugins.hook_registry import HookRegistry
STATUS.state = "not loaded"
hosts.check_version = lambda: "sglang 9.9.9 is outside the supported range"
plugin.register()
HookRegistry.apply_hooks()
try:
    scheduler.Scheduler(args, None)
except Exception as error:
    emit([type(error).__name__, str(error)])
"""
    )
    name, text = host_result(code)
    assert name == "HostMismatchError"
    assert "planned by moe_plugin, which is unsupported in this process: sglang 9.9.9" in text
