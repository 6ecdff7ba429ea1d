"""The serving benchmark without servers: variants, phases of a start, checkpoints."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors import safe_open

sys.path += [
    str(Path(__file__).parents[2] / "benchmarks" / "serving"),
    str(Path(__file__).parents[2] / "benchmarks"),
    str(Path(__file__).parents[1] / "support"),
]
import client
import loads
import models
import startup
import variants
from serving.checkpoint import Shape, write_checkpoint


def test_servers_of_several_gpus() -> None:
    """A rank per GPU for DeepEP; what the host divides by the groups is multiplied for it."""
    alone, four = variants.variant("b"), variants.variant("b", gpus=4)
    assert "--tp-size" not in alone.args
    flags = dict(zip(four.args[::2], four.args[1::2], strict=True))
    assert flags["--tp-size"] == flags["--attn-dp-size"] == "4"
    assert flags["--chunked-prefill-size"] == flags["--max-running-requests"] == "1024"
    assert flags["--cuda-graph-max-bs-decode"] == "256"
    size, groups, experts = (("--tp-size", "4"), ("--attn-dp-size", "4"), ("--ep-size", "4"))
    assert variants.variant("a", gpus=4).args == size
    assert variants.variant("t", gpus=4).args == size + experts
    assert variants.variant("g", gpus=4).args == size + groups + experts
    assert variants.variant("c", gpus=4).args == size + groups + variants.ON
    assert variants.variant("k", gpus=4).args[-3:] == variants.LOCAL_ENDS
    for name in "atgbkc":
        found = variants.variant(name, gpus=4)
        assert found.env["NCCL_NVLS_ENABLE"] == "0"
        assert ("MOE_PLUGIN_DISABLE" in found.env) == (name not in variants.OURS)
        assert found.dp_groups == (1 if name in variants.STOCK_TP else 4)
    for name in "tgx":
        with pytest.raises(ValueError, match="unknown variant"):
            variants.variant(name)


def test_host_client_asks_for_the_point() -> None:
    """Lengths, and either so many in flight or so many a second."""
    closed, arriving = loads.parse(["long/32", "chat@8"])
    given = client.arguments(closed, "http://x", "/m")
    flags = dict(pairwise(given))
    assert (flags["--random-input-len"], flags["--max-concurrency"]) == ("4300", "32")
    assert int(flags["--num-prompts"]) == 4 * 32
    given = client.arguments(arriving, "http://x", "/m")
    assert given[given.index("--request-rate") + 1] == "8.0"
    assert "--max-concurrency" not in given


LOG = [
    (20.0, "[x] Init parallel begin."),
    (21.0, "[x] Load weight begin. avail mem=139.13 GB"),
    (21.5, "[x] moe_plugin: 4 expert kernels ready after 0.2 s"),
    (24.0, "[x] Load weight end. elapsed=2.88 s, type=Qwen3MoeForCausalLM"),
    (25.0, "[x] KV Cache is allocated. dtype: torch.bfloat16"),
    (25.0, "[x] Capture target prefill CUDA graph begin. backend=breakable"),
    (26.0, "[x] Try DeepGEMM JIT Compiling for <GROUPED_GEMM_NT_BF16_MASKED> N=1536"),
    (29.0, "DeepGEMM warmup: 100%|##########| 16384/16384 [00:03<00:00, 5000it/s]"),
    (29.1, "DeepGEMM warmup: 100%|##########| 16384/16384 [00:03<00:00, 5000it/s]"),
    (30.0, "[x] Capture target prefill CUDA graph end. elapsed=5.00 s, mem usage=0.10 GB"),
    (30.0, "[x] Capture target decode CUDA graph begin. backend=full"),
    (33.0, "[x] Capture target decode CUDA graph end. bs=[1, 2], elapsed=3.00 s, mem usage=0 GB"),
    (34.0, "[x] The server is fired up and ready to roll!"),
]


def test_ranks_compile_side_by_side() -> None:
    ready = "moe_plugin: 4 expert kernels ready after {} s"
    lines = [(1.0, f"[x DP{r} TP{r} EP{r}] {ready.format(3.0 + r)}") for r in range(2)]
    assert startup.kernel_seconds(lines) == 4.0


def test_phases_of_a_start() -> None:
    phases = startup.phases(LOG)
    assert sum(phases.values()) == 34.0
    assert phases["imports and arguments"] == 20.0
    assert phases["weights"] == 3.0
    assert phases["prefill graphs"] == 5.0
    assert startup.kernel_seconds(LOG) == pytest.approx(3.2)
    assert startup.capture_seconds(LOG) == 8.0


def _header(folder: Path) -> dict[str, tuple[str, list[int]]]:

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                piece = file.get_slice(name)
                found[name] = (piece.get_dtype(), piece.get_shape())
    return found


@pytest.mark.parametrize(
    ("name", "layers", "fp8", "other"),
    [
        ("qwen3-bf16", 8, False, False),
        ("qwen3-fp8-12", 12, True, False),
        ("qwen3-bf16-16", 16, False, False),
        ("qwen3-bf16-4-other", 4, False, True),
    ],
)
def test_model_names_say_how_deep(
    name: str,
    layers: int,
    fp8: bool,
    other: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, bool, bool]] = []

    def write(folder: Path, shape: Shape, device: str, *, fp8: bool, seed: int) -> None:
        asked.append((shape.num_hidden_layers, fp8, seed != 0))

    monkeypatch.setattr(models, "write_qwen3", write)
    models.write_model(name, tmp_path, "cpu")
    assert asked == [(layers, fp8, other)]
    assert (tmp_path / "written").exists()


def test_unknown_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="qwen3-int4"):
        models.write_model("qwen3-int4", tmp_path, "cpu")


def test_fast_writer_writes_what_the_plain_one_does(tmp_path: Path) -> None:
    """Same names and shapes; in FP8 a scale per 128 x 128 block beside each quantised weight."""
    import torch

    shape = Shape(num_hidden_layers=2)
    plain = _header(write_checkpoint(tmp_path / "plain", shape, dtype=torch.bfloat16))
    models.write_qwen3(tmp_path / "fast", shape, "cpu", fp8=False)
    assert _header(tmp_path / "fast") == plain
    models.write_qwen3(tmp_path / "fp8", shape, "cpu", fp8=True)
    fp8 = _header(tmp_path / "fp8")
    assert {n for n in fp8 if not n.endswith("_scale_inv")} == set(plain)
    expert = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert fp8[expert] == ("F8_E4M3", [256, 128])
    assert fp8[expert + "_scale_inv"] == ("F32", [2, 1])
    index = json.loads((tmp_path / "fp8" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(fp8)
