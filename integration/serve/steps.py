"""What each step of this scheduler was, counted where the host starts it.

A step that replays a CUDA graph runs none of the model's Python, so nothing inside it can count.
The runner above it knows the batch before and whether a graph was replayed after, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...planning.integers import ceil_div
from ...runtime.stats import STATS, Execution
from . import process


def around_forward(
    original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND hook on ``ModelRunner.forward``, which runs the target model once per step.

    A draft model's steps are not counted: mostly its own runners replay them, past this place.
    """
    plan = process.current_plan()
    if plan is None or runner.is_draft_worker:
        return original(runner, forward_batch, *args, **kwargs)
    # Before the host pads both, for the collectives.
    mode, tokens = forward_batch.forward_mode, forward_batch.global_num_token_non_padded_cpu
    output = original(runner, forward_batch, *args, **kwargs)
    execution: Execution = "replayed" if output.can_run_graph else "eager"
    STATS.record_step(mode.name.lower(), execution, ceil_div(tokens or 0, plan.attn_tp_size))
    return output
