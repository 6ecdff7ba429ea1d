"""Ask the real host to resolve command lines: model directories, cases, one worker process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("resolving_worker.py")
LL = ("--moe-a2a-backend", "deepep", "--deepep-mode", "low_latency")

QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FP8_BLOCK = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": FP8_BLOCK,
}


def variant(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a model config with some entries changed."""
    return {**base, **changes}


MODELS: dict[str, dict[str, Any]] = {
    "qwen3": QWEN3_30B,
    "qwen3-fp8": variant(QWEN3_30B, quantization_config=FP8_BLOCK),
    "qwen3-tensor": variant(
        QWEN3_30B, quantization_config={"quant_method": "fp8", "activation_scheme": "static"}
    ),
    "qwen3-fp16": variant(QWEN3_30B, torch_dtype="float16"),
    "qwen3-hidden": variant(QWEN3_30B, hidden_size=2304, num_attention_heads=36),
    "qwen3-topk": variant(QWEN3_30B, num_experts_per_tok=20),
    "qwen3-126": variant(QWEN3_30B, num_experts=126),
    "qwen3-gelu": variant(QWEN3_30B, hidden_act="gelu"),
    "qwen3-235b": variant(
        QWEN3_30B, hidden_size=4096, moe_intermediate_size=1536, num_attention_heads=64
    ),
    "qwen3-dense": {
        **{
            k: v for k, v in QWEN3_30B.items() if "expert" not in k and k != "moe_intermediate_size"
        },
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
    },
    "deepseek-v3": DEEPSEEK_V3,
    "kimi-k2": variant(
        DEEPSEEK_V3,
        n_routed_experts=384,
        num_attention_heads=64,
        num_key_value_heads=64,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
    ),
    "glm5": variant(
        DEEPSEEK_V3,
        architectures=["GlmMoeDsaForCausalLM"],
        model_type="glm_moe_dsa",
        hidden_size=6144,
        num_attention_heads=64,
        num_key_value_heads=64,
        index_head_dim=128,
        index_n_heads=32,
        index_topk=2048,
        head_dim=64,
        qk_head_dim=192,
        n_group=1,
        topk_group=1,
    ),
    "qwen3-kv": variant(
        QWEN3_30B,
        quantization_config={**FP8_BLOCK, "kv_cache_quant_algo": "FP8"},
    ),
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "vocab_size": 1024,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    },
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 4096,
        "intermediate_size": 2880,
        "num_hidden_layers": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "vocab_size": 1024,
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
    },
}


def quantized(method: str, **more: Any) -> dict[str, Any]:
    """The small Qwen3-MoE with another quantization method in its config."""
    return variant(QWEN3_30B, quantization_config={"quant_method": method, **more})


def write_models(directory: Path, more: dict[str, dict[str, Any]] | None = None) -> dict[str, str]:
    """Write every model config below ``directory``; name -> path."""
    paths = {}
    for name, config in {**MODELS, **(more or {})}.items():
        path = directory / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        paths[name] = str(path)
    return paths


class Worker:
    """One fresh process with the real host, answering batches of cases.

    Args:
        model: a model directory, for the target's set-up.
        target: the device to resolve for; None for this machine's own.
        oracle: import the host's scheduling code too, for cases with ``requests``.
        env: extra environment variables.
    """

    def __init__(
        self,
        model: str,
        target: str | None = "h100",
        *,
        oracle: bool = False,
        env: dict[str, str] | None = None,
    ) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MOE_PLUGIN_")}
        environment.pop("SGLANG_PLATFORM", None)
        environment.update(PYTHONSAFEPATH="1", SGLANG_PLUGINS="none")
        paths = [str(WORKER.parent), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment.update(env or {})
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed in close()
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            cwd=Path(model).parent,
        )
        self._send({"target": target, "model": model, "oracle": oracle})

    def _send(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def ask(self, cases: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers, case by case. ``stock`` cases work in the first batch only."""
        assert self._process.stdout is not None
        self._send(list(cases))
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise AssertionError(f"the worker ended: {self._log.read()[-4000:]}")
        answers: list[dict[str, Any]] = json.loads(line)
        return answers

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=300)
        self._log.close()


def ask(
    cases: Iterable[dict[str, Any]],
    model: str,
    target: str | None = "h100",
    env: dict[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Answers of one fresh process."""
    worker = Worker(model, target, env=env)
    try:
        return worker.ask(cases)
    finally:
        worker.close()


class Launch:
    """Ask for one launch of a model; keeps test bodies to one line per question."""

    def __init__(self, worker: Worker, models: dict[str, str]) -> None:
        self._worker, self._models = worker, models

    def __call__(self, *flags: str, model: str = "qwen3", **case: Any) -> dict[str, Any]:
        argv = ["--model-path", self._models[model], *flags]
        return self._worker.ask([{"argv": argv, **case}])[0]
