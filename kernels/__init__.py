"""Kernels for experts that receive a fixed capacity and a live row count each.

    experts_torch.py      the layer in plain torch: the definition of what the kernels compute
    experts.py            `batched_experts`, `workspace_bytes`, `warmup`: what a server calls

Modules here import torch, triton and each other, nothing else of this project, and importing one
needs no GPU. Every launcher has a `_torch` twin of the same signature.
"""
