"""The baseline: the host's masked path, two DeepGEMM GEMMs and its activation kernel."""

import argparse
import time
from typing import Any

import torch


def layer_call(layer: tuple[Any, ...], masked_m: torch.Tensor, expected_m: int) -> torch.Tensor:
    """One layer, as the host's DeepGEMM runner calls it."""
    import deep_gemm

    x, x_scale, weights = layer
    w13, w2 = weights.w13, weights.w2
    experts, capacity, hidden = x.shape
    inter = w2.shape[-1]
    both = torch.empty((experts, capacity, 2 * inter), dtype=torch.bfloat16, device=x.device)
    out = torch.empty((experts, capacity, hidden), dtype=torch.bfloat16, device=x.device)
    if x_scale is None:
        from sglang.kernels.ops.moe.ep_moe_kernels import silu_and_mul_masked_fwd

        deep_gemm.m_grouped_bf16_gemm_nt_masked(x, w13, both, masked_m, expected_m)
        act = torch.empty((experts, capacity, inter), dtype=torch.bfloat16, device=x.device)
        silu_and_mul_masked_fwd(both, act, masked_m)
        deep_gemm.m_grouped_bf16_gemm_nt_masked(act, w2, out, masked_m, expected_m)
        return out
    from sglang.srt.layers.moe.moe_runner.deep_gemm import _varlen_deep_gemm_silu_mul_quant

    deep_gemm.fp8_m_grouped_gemm_nt_masked(
        (x, x_scale), (w13, weights.w13_scale), both, masked_m, expected_m
    )
    act, act_scale = _varlen_deep_gemm_silu_mul_quant(both, masked_m, group_size=128, topk=8)
    deep_gemm.fp8_m_grouped_gemm_nt_masked(
        (act, act_scale), (w2, weights.w2_scale), out, masked_m, expected_m
    )
    return out


def main() -> None:
    """Compile the baseline's kernels for one model, so that several can do so at once."""
    from cases import model_shape

    from moe_plugin.kernels.formats import BF16, FP8_BLOCK
    from moe_plugin.kernels.tuning.tune import random_layer

    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=int)
    parser.add_argument("dtype", choices=("bf16", "fp8"))
    parser.add_argument("rows", type=int, nargs="+")
    args = parser.parse_args()
    begin = time.time()
    weights = FP8_BLOCK if args.dtype == "fp8" else BF16
    shape = model_shape(args.model, weights, min(args.rows))
    layer = random_layer(shape, "cuda")
    masked_m = torch.zeros(shape.experts, dtype=torch.int32, device="cuda")
    for rows in args.rows:
        layer_call(layer, masked_m, rows)
    torch.cuda.synchronize()
    print(f"deepgemm ready: {shape} {time.time() - begin:.0f}s", flush=True)


if __name__ == "__main__":
    main()
