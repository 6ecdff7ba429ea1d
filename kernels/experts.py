"""Entry points of the batched-expert layer."""

from .experts_torch import batched_experts_torch

__all__ = ["batched_experts_torch"]
