"""The same launches on SGLang 0.5.20, 0.5.21 and 0.5.22: one plan, whatever the host calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ..support.resolving import LL, Worker, write_models
from ..support.versions import OLDER, overlay

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DP8 = ("--tp-size", "8", "--dp-size", "8", "--enable-dp-attention")
EAGLE = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3",
         "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")  # fmt: skip
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "on": ("qwen3", (*DP8, "--use-batched-dp-moe", "on")),
    "auto": ("qwen3-fp8", (*DP8, *LL)),
    "not batched": ("qwen3", DP8),
    "explicit kept": ("qwen3", (*DP8, *LL, "--chunked-prefill-size", "1024",
                                "--max-running-requests", "64")),
    "chunk refused": ("qwen3", (*DP8, *LL, "--chunked-prefill-size", "65536")),
    "chunking off": ("qwen3", (*DP8, *LL, "--chunked-prefill-size", "-1")),
    "contradiction": ("qwen3", (*DP8, "--use-batched-dp-moe", "on",
                                "--moe-a2a-backend", "mooncake")),
    "speculation": ("deepseek-v3", (*DP8, *LL, *EAGLE)),
    "prefill role": ("qwen3-fp8", (*DP8, *LL, "--disaggregation-mode", "prefill")),
    "decode role": ("qwen3-fp8", (*DP8, *LL, "--disaggregation-mode", "decode")),
    "mixed": ("qwen3", (*DP8, *LL, "--enable-mixed-chunk")),
    "late flip": ("deepseek-v3", ("--tp-size", "8", "--enable-waterfill")),
    "attention tp": ("kimi-k2", ("--tp-size", "8", "--dp-size", "2", "--enable-dp-attention", *LL)),
    "redundant": ("deepseek-v3", (*DP8, *LL, "--ep-num-redundant-experts", "32")),
}  # fmt: skip
COMPARED = ("chunked_prefill_size", "max_running_requests", "moe_a2a_backend", "deepep_mode",
            "mem_fraction_static")  # fmt: skip


def _answers(
    models: dict[str, str], config: Path, pythonpath: str | None
) -> dict[str, dict[str, Any]]:
    env = {"PYTHONPATH": pythonpath} if pythonpath else {}
    worker = Worker(models["qwen3"], env=env)
    cases = [{"argv": ["--model-path", models[m], *flags]} for m, flags in CASES.values()]
    cases.append({"argv": ["--model-path", models["qwen3"], "--config", str(config)]})
    try:
        return dict(zip([*CASES, "config file"], worker.ask(cases), strict=True))
    finally:
        worker.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model directories, by name."""
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``--config`` file in the spelling that every version takes."""
    path = tmp_path_factory.mktemp("config") / "serve.yaml"
    path.write_text("tp-size: 8\nuse-batched-dp-moe: true\n")
    return path


@pytest.fixture(scope="module")
def pinned(models: dict[str, str], config: Path) -> dict[str, dict[str, Any]]:
    """Answers of the pinned host."""
    return _answers(models, config, None)


@pytest.mark.parametrize("version", OLDER)
def test_older_host(
    version: str, models: dict[str, str], config: Path, pinned: dict[str, dict[str, Any]]
) -> None:
    """Same plan, same refusal, same resolved budgets, same bucket rules."""
    here = str(Path(__file__).parents[1] / "support")
    found = _answers(models, config, f"{overlay(version)}:{here}")
    for name, answer in found.items():
        expected = pinned[name]
        assert answer["ok"] == expected["ok"], (name, answer.get("error"))
        if not answer["ok"]:
            assert answer["errors"] == expected["errors"], name
            continue
        assert answer["plan"] == expected["plan"], name
        for field in COMPARED:
            assert answer["resolved"][field] == expected["resolved"][field], (name, field)
        if answer["plan"] and answer["prefill"]["backend"] != "disabled":
            assert all(size % 8 == 0 for size in answer["prefill"]["bs"]), name
