"""Batched data-parallel MoE for SGLang over a low-latency all-to-all.

Two ways lead through the house, in the order of the calls. This is the short form;
docs/architecture.md names every file on them.

From the flag to the buffer, before weights load::

    integration/plugin.py             registers everything below in each of the host's processes
    integration/flags.py              --use-batched-dp-moe on the host's parser
    integration/resolve/hooks.py      our three steps in the host's argument resolution
      launch_plan.py                     asks the four below about a launch
      launch_facts.py, model_facts.py    the host's records become frozen facts, at one door
      capability.py                      use_batched_dp_moe: the one predicate; backends/ answer it
      planning/planner.py                facts and limits in, frozen plan out
      fills.py                           what the user left unset is declared
      reservation.py, verification.py    the plan's bytes; the resolved values against the plan
    integration/serve/buffer.py       in a scheduler: the communication buffer, from the plan

From ``hidden_states`` to the combine, in every MoE layer::

    (host) dispatch                   DeepEP, or runtime/transports/ behind the host's dispatcher
    integration/serve/moe_layer.py    between the host's dispatch and combine
      expert_weights.py                  what the host's layer holds, as our experts take it
      packed_weights.py                  4-bit weights, repacked when they are loaded
      weight_updates.py                  and given back before the host loads again
    runtime/runner.py                 one plain runner, no chunk loop
    kernels/experts.py                two launches: sm90/ on Hopper, portable/ elsewhere
    (host) combine

Import rules, one direction: ``kernels`` imports nothing of ours; ``moe_plugin`` never imports
``integration``; only ``integration`` imports sglang; only ``runtime/transports/deepep_ll.py``
imports deep_ep. ``import moe_plugin`` needs neither torch nor sglang.
"""

from .batched_backend import BatchedBackend, Capability, CapabilityFacts, Mode
from .capability import (
    backend_names,
    get_backend,
    register_backend,
    unregister_backend,
    use_batched_dp_moe,
)
from .errors import BudgetError, ConfigError, HostMismatchError, MoePluginError, UnsupportedError
from .planning.limits import DEFAULT_MAX_NUM_BATCHED_TOKENS_FOR_BATCHED_DP, Limits

__version__ = "0.2.0.dev0"

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
