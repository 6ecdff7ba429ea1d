"""Launches in documents and manifests: resolved by the host with the plugin's hooks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_plugin.integration.serve.buffer import CREATED

from ..support.resolving import DEEPSEEK_V3, FP8_BLOCK, QWEN3_30B, Worker, variant, write_models

ROOT = Path(__file__).parents[2]
WHOLE = {
    "DeepSeek-V3": variant(
        DEEPSEEK_V3, num_hidden_layers=61, first_k_dense_replace=3, vocab_size=129280
    ),
    "Qwen3-30B-A3B-FP8": variant(
        QWEN3_30B, num_hidden_layers=48, vocab_size=151936, quantization_config=FP8_BLOCK
    ),
}
"""Models that are named, by the last part of their name, with every layer."""
IMAGE = ["--use-batched-dp-moe", "on", "--host", "0.0.0.0", "--port", "30000"]
"""What the container recipe's entry point adds."""
FILLED_IN = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "h0"}
"""Variables of LeaderWorkerSet, in the worker's pod."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_models(tmp_path_factory.mktemp("models"), WHOLE)


@pytest.fixture(scope="module")
def resolve(models: dict[str, str]) -> Iterator[Any]:
    """(flags, target) -> answer; one process per target."""
    workers: dict[str, Worker] = {}

    def ask(argv: list[str], target: str) -> dict[str, Any]:
        argv = [word.replace("=", " ", 1) if word.startswith("--") else word for word in argv]
        argv = [part for word in argv for part in word.split(" ", 1)]
        place = argv.index("--model-path") + 1
        argv[place] = models[argv[place].rpartition("/")[2]]
        if target not in workers:
            workers[target] = Worker(models["qwen3"], target)
        return workers[target].ask([{"argv": argv, "log": True}])[0]

    yield ask
    for worker in workers.values():
        worker.close()


def _commands(document: str) -> list[list[str]]:
    """Arguments of `sglang serve` in the document's code blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith("sglang serve ")]


def _manifests(name: str) -> list[dict[str, Any]]:
    return [doc for doc in yaml.safe_load_all((ROOT / "deploy" / name).read_text()) if doc]


def _protected(answer: dict[str, Any], argv: list[str]) -> None:
    assert answer["ok"], answer["error"]
    off = "off" in argv and argv[argv.index("off") - 1] == "--use-batched-dp-moe"
    assert (answer["plan"] is None) == off, answer["log"]


def test_the_readmes_launch_logs_what_it_says(resolve: Any) -> None:
    """Line by line, as far as resolution goes."""
    (argv,) = _commands("README.md")
    answer = resolve(argv, "h100")
    _protected(answer, argv)
    shown = re.findall(
        r"^batched data-parallel MoE: .+$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    logged = [line.partition("] ")[2] for line in answer["log"].splitlines()]
    assert shown == [line for line in logged if line.startswith("batched data-parallel MoE: ")]
    plan = answer["plan"]
    tokens = plan["max_dispatch_tokens_per_rank"]
    asked, planned = (plan[name] >> 20 for name in ("rdma_buffer_bytes", "rdma_device_bytes"))
    # What is taken is seen on a GPU only.
    created = CREATED.replace("%d", "%s") % (tokens, asked, "…", planned)
    assert created in (ROOT / "README.md").read_text()


def test_launches_of_operations_are_planned(resolve: Any) -> None:
    """On H200s; a prefill instance in normal mode has no plan."""
    commands = _commands("docs/operations.md")
    assert len(commands) == 5
    for argv in commands:
        _protected(resolve(argv, "h200"), argv)


def _containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = manifest["spec"]
    if manifest["kind"] == "LeaderWorkerSet":
        group = spec["leaderWorkerTemplate"]
        templates = [group["leaderTemplate"], group["workerTemplate"]]
    else:
        templates = [spec["template"]] if "template" in spec else []
    return [c for template in templates for c in template["spec"]["containers"]]


@pytest.mark.parametrize(
    ("name", "target", "servers"), [("lws-two-nodes.yaml", "h100", 2), ("pd-pair.yaml", "h200", 2)]
)
def test_manifests_launch_what_is_planned(
    resolve: Any, name: str, target: str, servers: int
) -> None:
    """Every container that serves, with what the controller fills in."""
    found = 0
    for manifest in _manifests(name):
        for container in _containers(manifest):
            if container["name"] != "sglang":
                continue
            found += 1
            command = container.get("command")
            argv = [*(command[2:] if command else IMAGE), *container["args"]]
            argv = [re.sub(r"\$\((\w+)\)", lambda m: FILLED_IN[m[1]], word) for word in argv]
            _protected(resolve([w for w in argv if "ib-device" not in w], target), argv)
            gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
            size = next(int(w.split("=")[1]) for w in argv if w.startswith("--tp-size"))
            assert size == gpus * (2 if name.startswith("lws") else 1)
    assert found == servers
