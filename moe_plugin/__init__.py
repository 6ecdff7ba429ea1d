"""Batched data-parallel MoE for SGLang over a low-latency all-to-all.

The way from the flag to the kernel::

    --use-batched-dp-moe           integration/flags.py       the host's parser, child processes
      -> capability                capability.py              one predicate, registrable backends
      -> budgets                   budgets.py                 integers in, frozen plan out
      -> resolution                integration/resolution.py  fill what is unset, refuse the rest
      -> buffer                    transports/                DeepEP, or torch.distributed
      -> experts                   integration/layer.py       between the host's dispatch, combine
      -> runner                    runner.py                  one plain runner, no chunk loop
      -> kernels                   kernels/                   batched experts, Triton and torch

Import rules, one direction: ``kernels`` imports nothing of ours; ``moe_plugin`` never imports
``integration``; only ``integration`` imports sglang; only ``transports/deepep_ll.py`` imports
deep_ep. ``import moe_plugin`` needs neither torch nor sglang.
"""

from .capability import (
    BatchedBackend,
    Capability,
    CapabilityFacts,
    Mode,
    backend_names,
    get_backend,
    register_backend,
    unregister_backend,
    use_batched_dp_moe,
)
from .errors import (
    BudgetError,
    ConfigError,
    HostMismatchError,
    MoePluginError,
    UnsupportedError,
)
from .limits import DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP, Limits

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP",
    "BatchedBackend",
    "BudgetError",
    "Capability",
    "CapabilityFacts",
    "ConfigError",
    "HostMismatchError",
    "Limits",
    "Mode",
    "MoePluginError",
    "UnsupportedError",
    "backend_names",
    "get_backend",
    "register_backend",
    "unregister_backend",
    "use_batched_dp_moe",
]
