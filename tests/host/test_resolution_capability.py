"""The capability's answer is what the host really builds, and third parties extend it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..support.resolving import Worker

BACKENDS = ("none", "deepep", "mooncake", "nixl", "mori", "ascend_fuseep", "flashinfer",
            "megamoe", "deepep_v2", "pplx")  # fmt: skip
MODES = ("auto", "normal", "low_latency")
TOPOLOGIES = [
    (tp, dp, ep)
    for tp in (1, 2, 8)
    for dp in (1, 2, 8)
    for ep in (1, 2, 8)
    if tp % dp == 0 and tp % ep == 0
]
FIXTURE = Path(__file__).parents[1] / "support" / "fixtures" / "backend_dist"


@pytest.fixture(scope="module")
def built(models: dict[str, str]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every combination, resolved by the stock host, with what it would build."""
    combinations = list(itertools.product(BACKENDS, MODES, TOPOLOGIES))
    cases = [
        {
            "stock": True,
            "layout": True,
            "argv": [
                *("--model-path", models["qwen3"], "--tp-size", f"{tp}", "--attn-dp-size", f"{dp}"),
                *("--ep-size", f"{ep}", "--moe-a2a-backend", backend, "--deepep-mode", mode),
            ],
        }
        for backend, mode, (tp, dp, ep) in combinations
    ]
    worker = Worker(models["qwen3"], oracle=True)
    try:
        return list(zip(combinations, worker.ask(cases), strict=True))
    finally:
        worker.close()


def test_host_resolved_every_backend_that_this_test_is_about(
    built: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    """Combinations that the host itself refuses prove nothing: enough must remain."""
    resolved = [combination for combination, answer in built if answer["ok"]]
    assert {backend for backend, _, _ in resolved} >= {"none", "deepep", "mooncake", "nixl"}
    for mode in MODES:
        topologies = {top for backend, m, top in resolved if (backend, m) == ("deepep", mode)}
        assert topologies == set(TOPOLOGIES)


def test_capability_equals_what_the_host_builds(
    built: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    """Over backend x mode x TP x DP x EP: batched iff a DeepEP layer resolves to low latency.

    Where the host cannot build the layer, we select the mode in which it can, or stay away.
    """
    for combination, answer in built:
        if not answer["ok"]:
            continue
        layout, ours = answer["layout"], answer["capability"]
        really = sorted(mode for mode, batched in layout["batched"].items() if batched)
        if not layout["builds"]:
            really = [] if combination[1] == "normal" else ["decode", "extend"]
        assert ours["modes"] == really, combination
        assert ours["ok"] == bool(really), combination
        if ours["ok"]:
            assert layout["layer"] == "DeepEPMoE", combination


@pytest.fixture
def third_party(models: dict[str, str], tmp_path: Path) -> Iterator[Worker]:
    """A process that has another distribution's backend installed."""
    shutil.copytree(FIXTURE / "tiny_backend", tmp_path / "tiny_backend")
    info = tmp_path / "tiny_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-backend\nVersion: 1.0\n")
    shutil.copy(FIXTURE / "entry_points.txt", info)
    here = str(Path(__file__).parents[1] / "support")
    worker = Worker(models["qwen3"], env={"PYTHONPATH": f"{tmp_path}:{here}"})
    yield worker
    worker.close()


def test_another_distribution_sees_its_own_budgets(
    third_party: Worker, models: dict[str, str]
) -> None:
    """Registered by entry point alone; budgets and refusals follow its limits, not DeepEP's."""
    base = ["--tp-size", "8", "--attn-dp-size", "8", "--moe-a2a-backend", "mori"]
    good, over, hidden, deepep = third_party.ask(
        [
            {"argv": ["--model-path", models["qwen3"], *base]},
            {
                "argv": [
                    "--model-path",
                    models["qwen3"],
                    *base,
                    "--batched-dp-moe-max-tokens",
                    "128",
                ]
            },
            {"argv": ["--model-path", models["qwen3-235b"], *base]},
            {"argv": ["--model-path", models["qwen3"], *base[:4], "--use-batched-dp-moe", "on"]},
        ]
    )
    assert good["plan"]["max_dispatch_tokens_per_rank"] == 64
    assert good["plan"]["rdma_buffer_bytes"] == 2 * 64 * 2048 * 128
    assert good["plan"]["nvshmem_qp_depth"] == 0
    assert good["resolved"]["chunked_prefill_size"] == 64
    assert good["resolved"]["max_running_requests"] == 512
    assert good["decode"]["max_bs"] == 64
    assert not over["ok"]
    assert "96" in over["error"]
    assert not hidden["ok"]
    assert "hidden size" in hidden["error"]
    assert deepep["plan"]["max_dispatch_tokens_per_rank"] == 256
