"""One query per request in the kernel of prefills and in that of decoding. `bench.py --out DIR`.

Where a decoding group joins another's prefill graphs, its requests are read by the first one; the
bounds of `integration/mixed_steps.py` come from here. SGLang's Triton backend, 32 heads over 4 KV
heads of 128 channels (Qwen3-30B-A3B), bf16.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

FOLDERS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(FOLDERS), str(FOLDERS / "transport")]
from package_versions import package_versions  # noqa: E402
from timing import gpu_seconds, repeated  # noqa: E402  (found through the path set above)

HEADS, KV_HEADS, CHANNELS, KV_SPLITS = 32, 4, 128, 8
REQUESTS = (1, 16, 64)
CONTEXTS = (256, 2048, 8192, 32768, 131072)
MOST_TOKENS = 1 << 21  # of K and V, 2 KiB each
REPEATS = 20


def microseconds(step: Callable[[], None]) -> float:
    """Mean of a few calls in a row, by CUDA events: short ones are bound by their launches."""
    step()
    torch.cuda.synchronize()
    return gpu_seconds(repeated(step, REPEATS)) / REPEATS * 1e6


def measure(requests: int, context: int) -> dict[str, float]:
    """Both kernels for the same queries and the same context."""
    cuda = torch.device("cuda")

    def random(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, heads, CHANNELS, dtype=torch.bfloat16, device=cuda)

    tokens = requests * context
    k, v = random(tokens, KV_HEADS), random(tokens, KV_HEADS)
    q, own_k, own_v = (random(requests, heads) for heads in (HEADS, KV_HEADS, KV_HEADS))
    out = torch.empty_like(q)
    one_each = torch.arange(requests + 1, device=cuda, dtype=torch.int32)
    indptr, indices = one_each * context, torch.arange(tokens, device=cuda)
    parts = torch.empty(requests, HEADS, KV_SPLITS, CHANNELS, device=cuda)
    lse = torch.empty(requests, HEADS, KV_SPLITS, device=cuda)
    splits = torch.full((requests,), KV_SPLITS, dtype=torch.int32, device=cuda)
    scale = CHANNELS**-0.5

    def decode() -> None:
        decode_attention_fwd(
            q, k, v, out, indptr, indices, parts, lse, splits, KV_SPLITS, scale, 1.0, 1.0
        )

    def extend() -> None:
        extend_attention_fwd(
            q, own_k, own_v, out, k, v, one_each, indptr, indices, None, True, None, 1, 1.0, 1.0,
            scale,
        )  # fmt: skip

    times = {"decode_us": microseconds(decode), "extend_us": microseconds(extend)}
    return {name: round(value, 1) for name, value in times.items()}


def main() -> None:
    """Every number of requests with every context that fits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder")
    out = parser.parse_args().out
    rows = []
    for requests in REQUESTS:
        for context in CONTEXTS:
            if requests * context <= MOST_TOKENS:
                row = {"requests": requests, "context": context, **measure(requests, context)}
                print(row, flush=True)
                rows.append(row)
    environment = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        **package_versions("sglang", "torch", "triton"),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "attention.json").write_text(json.dumps({"environment": environment, "rows": rows}))


if __name__ == "__main__":
    main()
