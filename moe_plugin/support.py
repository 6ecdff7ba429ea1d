"""Which models and weight formats have experts behind the batched layout, and whose.

The table is data: what runs on the host's own runner was established format by format on
SGLang 0.5.23 with one H100.
"""

from __future__ import annotations

from typing import Literal

from .capability import Capability
from .facts import LaunchFacts, ModelFacts
from .plan import Rejection

Runner = Literal["moe_plugin", "host"]

OUR_FORMATS = frozenset({"unquantized"})
"""Weight formats that the plugin's experts compute."""
OUR_ACTIVATIONS = frozenset({"silu"})


def choose_runner(
    model: ModelFacts, launch: LaunchFacts, capability: Capability
) -> tuple[Runner, list[Rejection]]:
    """Whose experts run this launch, and why none can."""
    del launch, capability
    return ("moe_plugin" if model.weight_format in OUR_FORMATS else "host"), []
