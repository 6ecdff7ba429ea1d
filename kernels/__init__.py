"""Kernels for experts that receive a fixed capacity and a live row count each.

    experts_torch.py      the layer in plain torch: the definition of what the kernels compute
    experts.py            `batched_experts`, `workspace_bytes`, `warmup`: what a server calls
    launch.py             which tiles for which shape: pure, needs neither torch nor a GPU
    problem.py            one GEMM as data: its tensors, and the GPU that it runs on
    layer.py              a layer as its two GEMMs, and the workspace between them
    hopper_launch.py      launcher of hopper.py, the warp-specialised kernel for SM90 that
                          hopper_ring.py feeds
    hopper_layer.py       the short way for a layer that has run before; direct_launch.py launches
    masked_gemm.py        launcher of portable.py, `masked_grouped_gemm`
    portable.py           the same in plain Triton: SM80 and later, and the CPU interpreter
    unfused.py            the layer in three launches, `masked_silu_quant`
    precompile.py         compile for a GPU that is not there, or in several processes
    tune.py, tuned/       measure launches; the tables that were measured

Modules here import torch, triton and each other, nothing else of this project, and importing one
needs no GPU. Every launcher has a `_torch` twin of the same signature.
"""
