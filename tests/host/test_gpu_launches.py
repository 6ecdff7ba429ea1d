"""Every server that GPU tests and the serving benchmark start: the host takes it on their devices.

Launches come from the tests' own modules, and checkpoints from the writer that they use, with
headers and sizes but without weights. What holds of a plan is in :mod:`..support.launch_checks`.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ..gpu import beside_stock, test_memory_gpu, test_server_formats
from ..gpu.features import machine
from ..gpu.launches import MODEL, Launch
from ..support import gpu_environment
from ..support.launch_checks import check
from ..support.resolving import Worker
from ..support.serving.checkpoint import write_config
from ..support.serving.quantised_checkpoint import quantization

sys.path += [
    str(Path(__file__).parents[2] / "benchmarks" / "serving"),
    str(Path(__file__).parents[1] / "support"),
]
import models
import variants

ROOT = Path(__file__).parents[2]

DEVICES = ("h100", pytest.param("h200", marks=pytest.mark.slow))
"""Of the same kind; the first has less memory."""
PROMPTS = [4000, 4000, 1000, 300, 60, 1]
GIB = 1 << 30
CONTEXT_GIB = 0.6
"""Of a process on a GPU, beside what is planned."""
PARTS = ("weights", "kv_cache", "buffer", "workspace", "graphs", "activations")
BENCHED = ("qwen3-bf16-16", "qwen3-fp8-16", "deepseek-v3", "deepseek-v3-6")
KV_TOKENS = 65536


def _launches(found: Any) -> Iterator[Launch]:
    """Those in a value, or in what it holds."""
    if isinstance(found, Launch):
        yield found
    elif isinstance(found, Mapping):
        yield from _launches(tuple(found.values()))
    elif isinstance(found, tuple | list):
        for value in found:
            yield from _launches(value)


def _of(module: ModuleType) -> Iterator[tuple[str, Launch]]:
    name = module.__name__.rpartition(".")[2]
    for variable, value in vars(module).items():
        for number, launch in enumerate(_launches(value)):
            yield f"{name} {variable} {number}", launch


def _on_all_gpus() -> Iterator[tuple[str, Launch]]:
    formats = test_server_formats
    for gpus in (2, 4):
        found = [(beside_stock.our_launch(MODEL, gpus), beside_stock.stock_launches(MODEL, gpus))]
        found += [(formats.ours(name, gpus), formats.stocks(name, gpus)) for name in formats.SERVED]
        for ours, stocks in found:
            for number, launch in enumerate((ours, *stocks)):
                name = f"{launch.model}/{gpus}"
                yield f"{number} on {gpus}, {launch.model}", replace(launch, model=name)


def _benched() -> Iterator[tuple[str, Launch]]:
    shared = (*variants.on_gpu("fa3"), *variants.resident(KV_TOKENS))
    for model, gpus, name in product(BENCHED, (2, 4), ("a", "t", "g", "b", "c", "d512")):
        variant = variants.variant(name, gpus=gpus)
        yield (
            f"bench {name} on {gpus}, {model}",
            Launch(model, (*shared, *variant.args), gpu_environment.DEEPEP | variant.env),
        )


FEATURES = {
    name: launch
    for path in sorted((ROOT / "tests" / "gpu" / "features").glob("test_*.py"))
    for name, launch in _of(import_module(f"tests.gpu.features.{path.stem}"))
}
OTHERS = dict(_of(test_memory_gpu)) | dict(_on_all_gpus()) | dict(_benched())
ALL = FEATURES | OTHERS


def _write(name: str, folder: Path) -> Path:
    base, _, gpus = name.partition("/")
    served = test_server_formats.SERVED.get(base.removesuffix(test_server_formats.STANDS_FOR))
    if served is None:
        return models.write_model(base, folder, "meta")
    write_config(folder, served.shape(int(gpus)), "bfloat16")
    if base in test_server_formats.SERVED:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = quantization(served.format)
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints, by name."""
    root = tmp_path_factory.mktemp("models")
    names = sorted({launch.model for launch in ALL.values()})
    return {name: str(_write(name, root / name.replace("/", "-"))) for name in names}


class Host:
    """One process for a device; stock launches are resolved before the plugin's hooks are there."""

    def __init__(self, paths: Mapping[str, str], device: str) -> None:
        self._paths, self.device = paths, device
        self._worker = Worker(paths[f"{MODEL}/2"], device, oracle=True)
        stock = {name: launch for name, launch in ALL.items() if launch.stock}
        cases = [{**self._case(launch), "stock": True} for launch in stock.values()]
        self.stock = dict(zip(stock, self._worker.ask(cases), strict=True))

    def _case(self, launch: Launch) -> dict[str, Any]:
        argv = ["--model-path", self._paths[launch.model], *launch.flags]
        return {"argv": argv, "env": dict(launch.env), "requests": PROMPTS}

    def resolve(self, launch: Launch) -> dict[str, Any]:
        """With rows by the host's scheduling code where there is a plan."""
        return self._worker.ask([self._case(launch)])[0]

    def ask(self, asked: dict[str, Any], **more: Any) -> dict[str, Any]:
        """For :func:`check`."""
        argv = [word for pair in asked["flags"].items() for word in pair if word]
        launch = Launch(asked["model"], tuple(argv), asked["env"])
        return self._worker.ask([{**self._case(launch), **more}])[0]

    def close(self) -> None:
        """End the process."""
        self._worker.close()


@pytest.fixture(scope="module", params=DEVICES)
def host(request: pytest.FixtureRequest, paths: dict[str, str]) -> Iterator[Host]:
    """The host on each device."""
    found = Host(paths, request.param)
    yield found
    found.close()


def _checked(launch: Launch) -> dict[str, Any]:
    """As :func:`check` takes it."""
    flags: dict[str, str] = {}
    for word in launch.flags:
        if word.startswith("--"):
            flags[word] = ""
        else:
            flags[list(flags)[-1]] = word
    flags.setdefault("--tp-size", "1")
    return {"model": launch.model, "flags": flags, "env": dict(launch.env)}


def _calls(node: ast.AST) -> Iterator[str]:
    names = (each.func for each in ast.walk(node) if isinstance(each, ast.Call))
    return (name.id for name in names if isinstance(name, ast.Name))


def test_servers_are_declared() -> None:
    """Every module of features has some, and makes none on the way; only round trips start none."""
    modules = {name.split()[0] for name in FEATURES}
    files = list((ROOT / "tests" / "gpu" / "features").glob("test_*.py"))
    assert {path.stem for path in files} - modules == {"test_round_trips"}
    for path in files:
        for function in ast.parse(path.read_text()).body:
            if isinstance(function, ast.FunctionDef) and "start" in set(_calls(function)):
                assert not {"sharing", "Launch"} & set(_calls(function)), (path.name, function.name)


def test_the_host_knows_the_variables() -> None:
    """A name that is misspelt changes nothing."""
    spec = find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    known = (Path(spec.origin).parent / "srt" / "environ.py").read_text()
    names = {name for launch in ALL.values() for name in launch.env if name.startswith("SGLANG_")}
    assert names
    assert names <= set(re.findall(r"SGLANG_\w+", known))


@pytest.mark.parametrize("name", [name for name, launch in ALL.items() if launch.stock])
def test_stock_launches_resolve(name: str, host: Host) -> None:
    """By the host alone."""
    answer = host.stock[name]
    assert answer["ok"], answer["error"]


@pytest.mark.parametrize("name", [name for name, launch in ALL.items() if not launch.stock])
def test_launches_are_planned_for_what_they_are_about(name: str, host: Host) -> None:
    """Planned, by the host's own answers too; or refused with what the test looks for."""
    launch = ALL[name]
    answer = host.resolve(launch)
    if launch.refused:
        assert not answer["ok"]
        assert launch.refused in answer["error"]
        return
    assert answer["ok"], answer["error"]
    plan = answer["plan"]
    if "off" in launch.flags:  # a prefill instance without an all-to-all
        assert plan is None
        return
    wanted = {"runner": "moe_plugin", "transport": "deepep", **launch.planned}
    assert {field: plan[field] for field in wanted} == wanted
    became, faults = check(_checked(launch), host.ask)
    assert became == "ok"
    assert not faults
    if name in FEATURES:
        planned = sum(plan["memory"][f"{part}_bytes"] for part in PARTS) / GIB
        assert planned + CONTEXT_GIB <= machine.PLACE_GIB
