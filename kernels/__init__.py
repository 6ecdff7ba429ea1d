"""Kernels for experts that receive a fixed capacity and a live row count each.

    experts.py            `batched_experts`, `warmup`: what a server calls
    experts_torch.py      the layer in plain torch: the definition of what the kernels compute
    formats.py            how weights are stored and what is computed: plain values
    weights.py            one layer's experts
    packing.py            the order of 4-bit weights
    launch.py, tuned/     which tiles for which shape: pure, needs neither torch nor a GPU
    workspace.py          bytes between the two GEMMs, for kernels and plans
    entry_checks.py       what is refused, and why
    problem.py            one GEMM as data: its tensors, and the GPU that it runs on
    expert_layer.py       a layer as its two GEMMs
    sm90/                 the warp-specialised kernel for Hopper: gemm_kernel.py multiplies what
                          ring.py streams, packed.py, packed_sums.py and dequantise.py its
                          4-bit weights, epilogue.py writes, gemm_launch.py launches
    portable/             the same in plain Triton: SM80 and later, and the CPU interpreter
    tuning/               measure launches; compile for a GPU that is not there

Modules here import torch, triton and each other, nothing else of this project, and importing one
needs no GPU. Every launcher has a `_torch` twin of the same signature.
"""
