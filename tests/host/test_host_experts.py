"""The table of weight formats against the host's own classes, registries and method names."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from moe_plugin.integration.resolve.host_runners import batched_runners
from moe_plugin.planning.facts import LaunchFacts
from moe_plugin.planning.weight_formats import FORMATS

from ..support.hosts import program, run_host

_FP8 = {"fp8_block", "fp8_tensor", "fp8_fp4", "fp8_nvfp4"}
_INT4 = {
    f"{name}_int4" for name in ("awq_marlin", "compressed-tensors", "gptq_marlin", "moe_wna16")
}
MADE_HERE = {
    "unquantized", "humming_fp4", "mxfp4", "gptq", "compressed-tensors_fp8", *_FP8, *_INT4
}  # fmt: skip
"""Formats that are no method of the host's by name: several kinds of one, or none. ``mxfp4`` and
``gptq`` are registered under a condition."""
ONLY_BUILT = {
    # Built without an error, but ModelOptNvFp4FusedMoEMethod.apply knows no humming.
    ("modelopt_fp4", "humming"),
    # Refused by the host's resolution before a layer is built (handle_moe_kernel_config).
    ("w4afp8", "flashinfer_cutedsl"),
}


def _host(*parts: str) -> Path:
    host = find_spec("sglang")
    assert host is not None
    assert host.submodule_search_locations
    return Path(host.submodule_search_locations[0], "srt", *parts)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0)])
def test_rows_say_what_the_hosts_classes_build(capability: tuple[int, int]) -> None:
    """For every format and runner that can be built without weights: DeepEPMoE's own gate."""
    done = run_host(program("host_experts"), *capability)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert len(answers) > 80
    for key, answer in answers.items():
        name, _, runner = key.partition(" ")
        listed = FORMATS[name].host.get(runner, FORMATS[name].any_runner)
        if answer.startswith("ok") and (name, runner) not in ONLY_BUILT:
            assert listed is not None, f"{key}: {answer}"
            assert answer == f"ok: {listed.runner or 'cutlass'}", key
        elif not answer.startswith("ok"):
            least = listed.least or (0, 0) if listed else (99, 0)
            assert least > capability, f"{key}: {answer}"


def test_every_method_of_the_host_has_a_row() -> None:
    """A method that a new host brings is left alone until somebody has looked at it."""
    source = _host("layers", "quantization", "__init__.py").read_text()
    table = source[source.index("BASE_QUANTIZATION_METHODS:") :]
    methods = set(re.findall(r'^    "([\w-]+)":', table[: table.index("\n}")], re.MULTILINE))
    assert methods - {"fp8"} == set(FORMATS) - MADE_HERE


def test_runners_are_read_from_the_hosts_source() -> None:
    """Whatever a row leads to is registered for low-latency rows; facts assume no more."""
    wanted = {host.runner for row in FORMATS.values() for host in row.host.values()} - {""}
    assert wanted == LaunchFacts().host_runners
    assert wanted <= batched_runners()
    assert "triton" not in batched_runners()


def test_only_prefill_context_parallelism_flips_a_model_to_deepep() -> None:
    """Foresight looks at models only where it, waterfill or a batched backend is asked for."""
    select = re.compile(r'moe_a2a_backend"?\]?\s*[=:]\s*"deepep"')
    folder = _host("arg_groups", "model_overrides")
    found = {path.name for path in folder.glob("*.py") if select.search(path.read_text())}
    assert found == {"deepseek_v2.py"}
