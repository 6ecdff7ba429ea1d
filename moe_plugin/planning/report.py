"""Plans as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .memory import gib
from .memory_record import Memory
from .plan import Plan


def table(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]  # fmt: skip
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _memory(memory: Memory) -> list[str]:
    """What is where on a rank's device, and what is left."""
    if memory.weights_source:
        weights = f"weights {gib(memory.weights_bytes)} ({memory.weights_source})"
        tokens = f", {memory.kv_cache_tokens} tokens" if memory.kv_cache_tokens else ""
        left = f"KV cache {gib(max(0, memory.kv_cache_bytes))}{tokens}"
    else:
        weights, left = "weights not known", f"with KV cache {gib(max(0, memory.kv_cache_bytes))}"
    kept = memory.multimodal_bytes
    media = f", for images, video and audio {gib(kept)}" if kept else ""
    return [
        f"device {gib(memory.device_bytes)}, of which {gib(memory.usable_bytes)} before weights; "
        f"{weights}, {left} at --mem-fraction-static {memory.mem_fraction_static:g}; kept back for "
        f"buffer {gib(memory.buffer_bytes)}, workspace {gib(memory.workspace_bytes)}, graphs "
        f"{gib(memory.graphs_bytes)} and activations {gib(memory.activations_bytes)}{media}",
    ]


def render(plan: Plan, draw: Callable[[Sequence[Sequence[str]]], str] = table) -> str:
    """A plan as text: verdict, budgets with their arithmetic, bytes, errors."""
    lines = [f"batched data-parallel MoE: {plan.capability.reason}"]
    if plan.budgets:
        rows = [("budget", "value", "source", "limit that binds", "headroom", "arithmetic")]
        rows += [
            (
                budget.name,
                "-" if budget.value is None else str(budget.value),
                budget.source,
                budget.limit,
                "-" if budget.headroom is None else str(budget.headroom),
                budget.arithmetic,
            )
            for budget in plan.budgets
        ]
        lines += ["", draw(rows)]
    if plan.capability.ok:
        lines += [
            "",
            f"transport {plan.transport}, experts of {plan.experts}, {plan.ep_size} ranks, "
            f"{plan.num_experts} experts, hidden {plan.hidden_size}, top-{plan.top_k}, "
            f"{plan.dtype}",
            f"buffer {plan.rdma_buffer_bytes} bytes ({gib(plan.rdma_buffer_bytes)}), on the device "
            f"{gib(plan.rdma_device_bytes)}; workspace {gib(plan.workspace_bytes)}; per rank",
        ]
    if plan.groups_apart:
        lines.append(
            "each DP group replays its own graph: --moe-dense-tp-size 1 --enable-dp-lm-head"
        )
    if plan.mixed_chunk:
        lines.append("decode rows ride along with prefill chunks: --enable-mixed-chunk")
    if plan.memory is not None:
        lines += _memory(plan.memory)
    if plan.prompt_steps:
        steps = ", ".join(f"{tokens}: {steps}" for tokens, steps in plan.prompt_steps)
        lines.append(f"prefill steps of a prompt alone, by its tokens: {steps}")
    lines += [f"note: {note}" for note in plan.notes]
    lines += [f"refused: {error}" for error in plan.errors]
    lines.append(f"verdict: {plan.verdict}")
    return "\n".join(lines)
