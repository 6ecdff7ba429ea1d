"""Prometheus metrics of this scheduler, beside the host's own and with its labels.

The host runs prometheus_client in multiprocess mode: a value is one write into a mapped file, which
the HTTP server's process reads when it is scraped. docs/operations.md says what each metric means.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from ... import __version__
from ...planning.plan import Plan
from ...runtime.stats import STATS, Execution
from ..attached_plan import plan_of

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Histogram

logger = logging.getLogger(__name__)

PREFIX = "sglang_moe_plugin_"
RATIOS = (*(2.0**-k for k in range(8, 0, -1)), 3 / 4, 1.0)
"""Edges of the rows of a step as a share of T. What lies above 1 was let pass by nobody."""
DECODES = ("decode", "idle", "target_verify")
"""Forward modes whose rows T bounds even where prefill goes another way: ``--deepep-mode auto``."""


def after_init_metrics_collector(result: Any, scheduler: Any, *_args: Any, **_kwargs: Any) -> Any:
    """AFTER hook on ``Scheduler.init_metrics_collector``; nothing without ``--enable-metrics``.

    No server stays down for want of a metric: the host's collector may be somebody's own class.
    """
    plan, host = plan_of(scheduler.server_args), scheduler.metrics_collector
    if plan is not None and host is not None:
        try:
            STATS.observer = PlanMetrics(plan, host.labels)
        except Exception as error:
            logger.warning("moe_plugin offers no metrics: %s: %s", type(error).__name__, error)
    return result


class PlanMetrics:
    """The plan as gauges, and what :class:`~moe_plugin.runtime.stats.Stats` counts.

    Args:
        plan: of this process.
        labels: the host's: model, ranks, and what the user added. One that has the name of a label
            of ours is left out.
        registry: of the metrics; prometheus_client's own by default.
    """

    def __init__(
        self, plan: Plan, labels: Mapping[str, Any], registry: CollectorRegistry | None = None
    ) -> None:
        # Not before the host has set PROMETHEUS_MULTIPROC_DIR, which this import reads.
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        described = plan_labels(plan)
        own = {"mode", "execution", *described}
        labels = {name: value for name, value in labels.items() if name not in own}
        names, registry = tuple(labels), registry or REGISTRY

        def gauge(name: str, text: str, value: float) -> Gauge:
            made = Gauge(
                PREFIX + name, text, names, registry=registry, multiprocess_mode="mostrecent"
            )
            child = made.labels(**labels)
            child.set(value)
            return child

        self._tokens_per_rank = plan.max_dispatch_tokens_per_rank
        self._bounds_prefill = plan.bounds_prefill
        gauge(
            "max_dispatch_tokens_per_rank",
            "T: rows that one rank may dispatch in one step.",
            self._tokens_per_rank,
        )
        gauge(
            "buffer_planned_bytes",
            "Device memory planned for the communication buffer.",
            plan.rdma_device_bytes,
        )
        gauge(
            "workspace_planned_bytes",
            "Device memory planned for the rows of one MoE layer.",
            plan.workspace_bytes,
        )
        self._taken = {
            "buffer": gauge(
                "buffer_taken_bytes",
                "Device memory that creating the communication buffer took.",
                0,
            ),
            "workspace": gauge(
                "workspace_taken_bytes",
                "Device memory that the rows of one MoE layer took.",
                0,
            ),
        }
        Gauge(
            PREFIX + "plan_info",
            "The plan that this rank runs under; always 1.",
            (*names, *described),
            registry=registry,
            multiprocess_mode="mostrecent",
        ).labels(**labels, **described).set(1)
        self._refusals = Counter(
            PREFIX + "refusals_total",
            "Batches above T that were refused before anything was sent.",
            names,
            registry=registry,
        ).labels(**labels)
        steps = Counter(
            PREFIX + "steps_total",
            "Forwards of the model, by the host's forward mode and how they ran.",
            (*names, "mode", "execution"),
            registry=registry,
        )
        rows = Histogram(
            PREFIX + "step_rows_ratio",
            "Rows that this rank dispatched in a step, padding apart, as a share of T.",
            (*names, "mode"),
            registry=registry,
            buckets=RATIOS,
        )

        @cache
        def steps_of(mode: str, execution: Execution) -> Counter:
            return steps.labels(**labels, mode=mode, execution=execution)

        @cache
        def rows_of(mode: str) -> Histogram:
            return rows.labels(**labels, mode=mode)

        self._steps_of, self._rows_of = steps_of, rows_of
        mixed = ("mixed",) if plan.mixed_chunk else ()
        for mode in ("extend", *mixed, "decode", "idle"):  # a share of none is 0, not absent
            steps_of(mode, "replayed"), steps_of(mode, "eager")

    def step(self, mode: str, execution: Execution, rows: int) -> None:
        """The model ran once."""
        self._steps_of(mode, execution).inc()
        if self._bounds_prefill or mode in DECODES:
            self._rows_of(mode).observe(rows / self._tokens_per_rank)

    def refusal(self) -> None:
        """The guard refused a batch."""
        self._refusals.inc()

    def device_bytes(self, what: Literal["buffer", "workspace"], taken: int) -> None:
        """Device memory was measured, in bytes."""
        self._taken[what].set(taken)


def plan_labels(plan: Plan) -> dict[str, str]:
    """What of a plan one wants to see beside a graph, and to group servers by."""
    return {
        "version": __version__,
        "backend": plan.capability.backend,
        "transport": plan.transport,
        "experts": plan.experts,
        "modes": ",".join(sorted(mode.value for mode in plan.capability.modes)),
        "ranks": str(plan.ep_size),
        "chunked_prefill_size": str(plan.chunked_prefill_size),
        "max_running_requests": str(plan.max_running_requests),
        "cuda_graph_max_bs_prefill": str(plan.cuda_graph_max_bs_prefill),
        "cuda_graph_max_bs_decode": str(plan.cuda_graph_max_bs_decode),
        "groups_apart": str(plan.groups_apart).lower(),
        "mixed_chunk": str(plan.mixed_chunk).lower(),
    }
