"""Does DeepEP's combine wait for an expert's signal on this GPU? `signals.py --out DIR`.

With `overlap`, `low_latency_combine` takes a signal per local expert, and a send that waits for it
could run beside the second GEMM. Here the experts' rows are zeros until the copy engine, 50 ms
later, writes them and then raises every signal: the combined tokens tell which of the two was read.
A kernel could not write them: the combine takes every multiprocessor at once.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
sys.path.append(str(FOLDER.parents[1]))
from package_versions import package_versions  # noqa: E402  (found through the path set above)

from tests.support import gpu_environment  # noqa: E402
from tests.support.ranks import run_ranks  # noqa: E402

TOKENS, HIDDEN, TOP_K, EXPERTS_PER_RANK = 128, 7168, 8, 32
LATE_S = 0.05


def one_rank(group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """What the combine read, and how long it took, with signals and without."""
    from moe_plugin.runtime.transports.deepep_ll import create_deepep_buffer

    rank, ranks = group.rank(), group.size()
    torch.cuda.set_device(rank % torch.cuda.device_count())
    experts = EXPERTS_PER_RANK * ranks
    buffer = create_deepep_buffer(
        group, max_num_tokens=TOKENS, hidden_size=HIDDEN, num_experts=experts, qp_depth=1024
    )
    torch.manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    ids = torch.rand(TOKENS, experts, device="cuda").topk(TOP_K, 1).indices
    weights = torch.rand(TOKENS, TOP_K, device="cuda")
    found = []
    for overlap in (False, True):
        received, _, handle, *_ = buffer.low_latency_dispatch(
            x, ids, TOKENS, experts, use_fp8=False
        )
        rows = received.clone()
        late = torch.zeros_like(rows)
        signals = torch.zeros(EXPERTS_PER_RANK * 64, device="cuda", dtype=torch.int32)
        torch.cuda.synchronize()
        dist.barrier(group)
        late_rows, raised = rows.cpu().pin_memory(), torch.ones_like(signals).cpu().pin_memory()
        torch.cuda.synchronize()
        writer, begin, end = torch.cuda.Stream(), *_events()
        options = {}
        if overlap:
            options = {
                "overlap": True,
                "src_signals": signals.view(torch.uint32),
                "src_signal_expect_value": 1,
            }
        begin.record()
        combined, _, _ = buffer.low_latency_combine(late, ids, weights, handle, **options)
        end.record()
        time.sleep(LATE_S)
        with torch.cuda.stream(writer):
            late.copy_(late_rows, non_blocking=True)
            signals.copy_(raised, non_blocking=True)
        torch.cuda.synchronize()
        # The experts return what they got, so a token comes back times its weights' sum.
        wanted = x.float() * weights.sum(1, keepdim=True)
        found.append({
            "overlap": overlap,
            "ms": begin.elapsed_time(end),
            "read_late_rows": torch.allclose(combined.float(), wanted, rtol=0.02, atol=0.02),
            "read_zeros": not combined.any().item(),
        })  # fmt: skip
        dist.barrier(group)
    buffer.destroy()
    return found


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def main() -> None:
    """All GPUs of this machine, a rank each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ranks = torch.cuda.device_count()
    os.environ.update(gpu_environment.DEEPEP)
    record = {
        "device": torch.cuda.get_device_name(),
        "gpus": ranks,
        "date": datetime.date.today().isoformat(),
        **package_versions("torch", "sgl-deep-ep", "nvidia-nvshmem-cu13"),
        "ranks": run_ranks(ranks, one_rank, timeout_s=150.0),
    }
    print(json.dumps(record, indent=1))
    (args.out / "transport-signals.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
