"""Every message that docs/troubleshooting.md explains is one that somebody can see."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_plugin.batched_backend import Capability
from moe_plugin.errors import MoePluginError
from moe_plugin.integration import flags, plugin
from moe_plugin.integration.attached_plan import attach_plan
from moe_plugin.integration.resolve.refusals import leave_alone
from moe_plugin.integration.serve import start_guard
from moe_plugin.integration.status import STATUS
from moe_plugin.planning.plan import Plan
from moe_plugin.runtime.stats import Stats
from moe_plugin.runtime.transports.agreement import check_ranks_agree, check_room
from moe_plugin.runtime.transports.guarded import check_tokens

from ..support.hosts import program, run_host
from ..support.resolving import DEEPSEEK_V3, Launch, variant, write_models

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "troubleshooting.md").read_text()
MESSAGES = re.findall(r"^## `(.+)`$", DOCUMENT, re.MULTILINE)
TP8 = ("--tp-size", "8", "--attn-dp-size", "8")
ON = (*TP8, "--use-batched-dp-moe", "on")
WHOLE = variant(DEEPSEEK_V3, num_hidden_layers=61, first_k_dense_replace=3, vocab_size=129280)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With one that fills eight H100."""
    return write_models(tmp_path_factory.mktemp("models"), {"deepseek-v3-whole": WHOLE})


def _raised(call: Callable[[], Any]) -> str:
    with pytest.raises(MoePluginError) as error:
        call()
    return str(error.value)


def _not_active(state: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(STATUS, "state", state)
    request = flags.Request("on", None, flags.SWITCH_FLAG)
    return _raised(partial(plugin.refuse_if_asked, request))


def _ranks_differ(monkeypatch: pytest.MonkeyPatch) -> str:
    def gather(found: list[Any], mine: Any, group: Any) -> None:
        found[:] = [mine, {"tokens per rank": 128}]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    group = SimpleNamespace(size=lambda: 2)
    return _raised(partial(check_ranks_agree, group, {"tokens per rank": 256}))


def _no_room(monkeypatch: pytest.MonkeyPatch) -> str:
    def gather(found: list[Any], mine: Any, group: Any) -> None:
        found[:] = [mine, 2**20]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    group = SimpleNamespace(size=lambda: 2)
    return _raised(partial(check_room, group, 2**30, 2**31))


def _shipped(package: str, *files: str) -> bytes:
    """What a package of the host has in a file of its own."""
    spec = find_spec(package)
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or ())))
    (path,) = {match.resolve() for file in files for match in folder.glob(file)}
    return path.read_bytes()


def _recorded() -> str:
    path = ROOT / "benchmarks" / "results" / "2026-11-27-h100-serving-stock.json"
    return " ".join(row["line"] for row in json.loads(path.read_text())["stock"])


OURS = ("moe_plugin is unsupported", "moe_plugin is disabled")
FOREIGN = {
    "Not enough memory. Please try to increase --mem-fraction-static.": (
        "sglang",
        "srt/model_executor/pool_configurator.py",
    ),
    "The memory capacity is unbalanced": ("sglang", "srt/distributed/bootstrap.py"),
    "CUDA out of memory": ("torch", "lib/libc10_cuda.so"),
    "init failed for transport: IBGDA": ("nvidia.nvshmem", "lib/libnvshmem_host.so*"),
    "DeepEP timeout": ("deep_ep", "_C*.so"),
}
REFUSED = {
    "tokens per rank": ("deepseek-v3", (*ON, "--batched-dp-moe-max-tokens", "2048"), {}),
    "device memory": ("deepseek-v3-whole", ON, {}),
    "deep_ep is not installed": ("qwen3", ON, {"without": "deep_ep"}),
}
"""Message -> model, flags and installation that it answers."""


@pytest.mark.parametrize("message", [m for m in MESSAGES if m in FOREIGN])
def test_messages_of_others(message: str) -> None:
    """As the packages that ship them have them."""
    assert message.encode() in _shipped(*FOREIGN[message])


@pytest.mark.parametrize("message", [m for m in MESSAGES if m in REFUSED])
def test_launches_that_are_refused(launch: Launch, message: str) -> None:
    """Resolved by the host."""
    model, given, installation = REFUSED[message]
    answer = launch(*given, model=model, **installation)
    assert not answer["ok"]
    assert message in answer["error"]


def test_messages_of_the_plugins_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Brought about where they arise."""
    for message in OURS:
        assert message in MESSAGES
        assert message in _not_active(message.split()[-1], monkeypatch)
    assert "(n <= T)" in _raised(partial(check_tokens, 257, 256, "on this rank"))
    assert "one all-to-all for all ranks" in _ranks_differ(monkeypatch)
    assert "device memory for the all-to-all's buffer" in _no_room(monkeypatch)
    with caplog.at_level(logging.WARNING):
        leave_alone(SimpleNamespace(), ["a reason"])
    assert "leaves this launch alone: a reason" in caplog.text
    on = SimpleNamespace()
    monkeypatch.setenv("MOE_PLUGIN_USE_BATCHED_DP_MOE", "on")
    refused = _raised(partial(leave_alone, on, ["a reason"]))
    assert "moe_plugin cannot act on this launch: a reason" in refused
    planned = SimpleNamespace()
    attach_plan(planned, Plan(capability=Capability(True, "")))
    unplanned = _raised(partial(start_guard.refuse_planned, None, planned))
    assert "this launch was planned by moe_plugin" in unplanned
    monkeypatch.setattr(STATUS, "hooked", ["sglang.srt.somewhere.else"])
    unhooked = _raised(partial(start_guard.before_scheduler_init, None, planned))
    assert "the host did not apply our hooks" in unhooked
    stats = Stats()
    stats.dispatches = 1
    assert "calls of the all-to-all in the steps so far" in _raised(stats.check_calls)


def test_the_flag_is_unknown_without_the_plugin(models: dict[str, str]) -> None:
    """The host's parser ends the process."""
    argv = ["--model-path", models["qwen3"], *ON]
    done = run_host(program("parsed_arguments"), argv, env={"SGLANG_PLUGINS": "none"})
    assert done.returncode != 0
    assert "unrecognized arguments: --use-batched-dp-moe" in done.stderr


def test_a_cuda_assertion_of_deepep() -> None:
    """As an H100 showed it."""
    assert "x.size(0) <= num_max_dispatch_tokens_per_rank" in _recorded()


def test_every_message_is_provoked() -> None:
    """Here, or where the note says; and each is explained in the same way."""
    here = Path(__file__).read_text() + Path(__file__).with_name("test_plugin_host.py").read_text()
    assert [message for message in MESSAGES if message not in here] == []
    for section in DOCUMENT.split("\n## ")[1:]:
        for word in ("**Cause.**", "**Check.**", "**Fix.**"):
            assert section.count(word) == 1, section
