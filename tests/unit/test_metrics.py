"""Metrics: what is counted once is what /server_info shows and what Prometheus reads."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from moe_plugin import BudgetError, Capability, Mode
from moe_plugin.integration.attached_plan import attach_plan
from moe_plugin.integration.serve import metrics, process, steps
from moe_plugin.planning.plan import Plan
from moe_plugin.runtime.stats import Stats
from moe_plugin.runtime.transports.guarded import RowGuard

ROOT = Path(__file__).parents[2]
LABELS = {"model_name": "m", "tp_rank": 3}
PLAN = Plan(
    capability=Capability(True, "", frozenset(Mode), "deepep"),
    max_dispatch_tokens_per_rank=128,
    rdma_device_bytes=2**30,
    workspace_bytes=2**20,
    attn_tp_size=2,
    ep_size=8,
)


class Scraped:
    """A registry with the plan's metrics, fed by its own counters."""

    def __init__(self, plan: Plan = PLAN, **more: str) -> None:
        self.registry = CollectorRegistry()
        self.stats = Stats()
        self.stats.observer = metrics.PlanMetrics(plan, LABELS | more, self.registry)

    def value(self, name: str, **labels: str) -> float | None:
        """Of one series; None where there is none."""
        found = {"model_name": "m", "tp_rank": "3", **labels}
        return self.registry.get_sample_value(metrics.PREFIX + name, found)

    def names(self) -> set[str]:
        """Of all metrics, as a query names them."""
        return {sample.name for family in self.registry.collect() for sample in family.samples}


@pytest.fixture
def scraped() -> Scraped:
    return Scraped()


@pytest.mark.parametrize("name", ["mode", "execution", "version", "ranks"])
def test_a_users_label_may_have_the_name_of_one_of_ours(name: str) -> None:
    """``--extra-metric-labels``: ours wins, and the server starts."""
    scraped = Scraped(**{name: "theirs"})
    scraped.stats.record_step("decode", "eager", 3)
    assert scraped.value("steps_total", mode="decode", execution="eager") == 1


def test_a_collector_without_labels_costs_the_metrics_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server_args = SimpleNamespace()
    attach_plan(server_args, PLAN)
    scheduler = SimpleNamespace(server_args=server_args, metrics_collector=object())
    metrics.after_init_metrics_collector(None, scheduler)
    assert "offers no metrics: AttributeError" in caplog.text


def test_an_observer_that_fails_is_dropped(scraped: Scraped) -> None:
    class Full:
        def step(self, *_: object) -> None:
            raise OSError("no space left on device")

    scraped.stats.observer = Full()  # type: ignore[assignment]
    for _ in range(2):
        scraped.stats.record_step("decode", "eager", 3)
    assert scraped.stats.observer is None
    assert scraped.stats.steps["decode", "eager"] == 2


def test_the_plan_is_there_before_the_first_step(scraped: Scraped) -> None:
    assert scraped.value("max_dispatch_tokens_per_rank") == 128
    assert scraped.value("buffer_planned_bytes") == 2**30
    assert scraped.value("workspace_planned_bytes") == 2**20
    assert scraped.value("plan_info", **metrics.plan_labels(PLAN)) == 1
    assert metrics.plan_labels(PLAN)["modes"] == "decode,extend"
    for name in ("buffer_taken_bytes", "workspace_taken_bytes", "refusals_total"):
        assert scraped.value(name) == 0
    assert scraped.value("steps_total", mode="decode", execution="replayed") == 0


def test_steps_are_counted_once_for_both_readers(scraped: Scraped) -> None:
    scraped.stats.record_step("decode", "replayed", 4)
    scraped.stats.record_step("decode", "replayed", 8)
    scraped.stats.record_step("decode", "eager", 8)
    scraped.stats.record_step("target_verify", "eager", 128)
    shown = scraped.stats.as_dict()["steps"]
    assert shown == {"decode": {"replayed": 2, "eager": 1}, "target_verify": {"eager": 1}}
    for mode, counts in shown.items():
        for execution, count in counts.items():
            assert scraped.value("steps_total", mode=mode, execution=execution) == count


def test_rows_are_a_share_of_t(scraped: Scraped) -> None:
    """A full step lies within the last edge, and nothing but a step above T beyond it."""
    for rows in (0, 32, 33, 128):
        scraped.stats.record_step("extend", "eager", rows)
    below = {"0.00390625": 1, "0.25": 2, "0.5": 3, "0.75": 3, "1.0": 4, "+Inf": 4}
    for edge, count in below.items():
        assert scraped.value("step_rows_ratio_bucket", mode="extend", le=edge) == count, edge
    assert scraped.value("step_rows_ratio_sum", mode="extend") == (32 + 33 + 128) / 128


def test_modes_that_a_plan_brings_are_there_before_their_first_step() -> None:
    """A share of none is 0 on a dashboard, not absent."""
    mixed = Scraped(replace(PLAN, mixed_chunk=True))
    assert mixed.value("steps_total", mode="mixed", execution="replayed") == 0
    assert mixed.value("steps_total", mode="extend", execution="eager") == 0


def test_rows_that_t_does_not_bound_are_no_share_of_it() -> None:
    """``--deepep-mode auto``: prefill goes another way. Its steps are counted all the same."""
    decodes = Capability(True, "", frozenset({Mode.DECODE}), "deepep")
    scraped = Scraped(replace(PLAN, capability=decodes))
    for mode in ("extend", "decode", "target_verify"):
        scraped.stats.record_step(mode, "eager", 4)
        assert scraped.value("steps_total", mode=mode, execution="eager") == 1
        found = scraped.value("step_rows_ratio_count", mode=mode)
        assert found == (None if mode == "extend" else 1)


def test_a_refusal_is_told_before_the_process_ends(scraped: Scraped) -> None:
    guard = RowGuard(128, stats=scraped.stats)
    guard.check(128)
    assert scraped.value("refusals_total") == 0
    with pytest.raises(BudgetError):
        guard.check(129)
    assert scraped.value("refusals_total") == scraped.stats.as_dict()["refusals"] == 1


@pytest.mark.parametrize("what", ["buffer", "workspace"])
def test_memory_that_was_measured(scraped: Scraped, what: Any) -> None:
    scraped.stats.record_device_bytes(what, 12345)
    assert scraped.value(f"{what}_taken_bytes") == 12345
    assert scraped.stats.as_dict()[f"{what}_device_bytes"] == 12345


@pytest.mark.parametrize("replays", [True, False])
def test_a_step_is_what_it_was_before_the_host_padded_it(
    monkeypatch: pytest.MonkeyPatch, replays: bool
) -> None:
    """Rows are those of one rank of two, and a draft's steps are not the model's."""
    stats = Stats()
    monkeypatch.setattr(steps, "STATS", stats)
    monkeypatch.setattr(process, "current_plan", lambda: PLAN)
    rows: list[int] = []
    stats.observer = SimpleNamespace(step=lambda mode, execution, n: rows.append(n))
    output = SimpleNamespace(can_run_graph=replays)

    def forward(runner: Any, batch: Any, *, reinit_attn_backend: bool) -> Any:
        batch.forward_mode = SimpleNamespace(name="EXTEND")
        batch.global_num_token_non_padded_cpu = 64
        return output

    for draft in (False, True):
        mode = SimpleNamespace(name="IDLE" if draft else "DECODE")
        batch = SimpleNamespace(forward_mode=mode, global_num_token_non_padded_cpu=7)
        runner = SimpleNamespace(is_draft_worker=draft)
        assert steps.around_forward(forward, runner, batch, reinit_attn_backend=True) is output
    assert stats.steps == {("decode", "replayed" if replays else "eager"): 1}
    assert rows == [4]


def test_nothing_is_counted_without_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = Stats()
    monkeypatch.setattr(steps, "STATS", stats)
    monkeypatch.setattr(process, "current_plan", lambda: None)
    assert steps.around_forward(lambda *_: "output", None, None) == "output"
    assert not stats.steps


@pytest.mark.parametrize(("plan", "enabled"), [(PLAN, False), (None, True)])
def test_nobody_is_told_without_metrics_or_plan(
    monkeypatch: pytest.MonkeyPatch, plan: Plan | None, enabled: bool
) -> None:
    stats = Stats()
    monkeypatch.setattr(metrics, "STATS", stats)
    host = SimpleNamespace(labels=LABELS) if enabled else None
    scheduler = SimpleNamespace(server_args=SimpleNamespace(), metrics_collector=host)
    attach_plan(scheduler.server_args, plan)
    metrics.after_init_metrics_collector(None, scheduler)
    assert stats.observer is None


def test_documents_and_dashboard_name_metrics_that_exist(scraped: Scraped) -> None:
    """The server's tests hold the dashboard against a real scrape, with the host's metrics."""
    scraped.stats.record_step("extend", "eager", 1)
    names = {name for name in scraped.names() if not name.endswith("_created")}
    dashboard = (ROOT / "deploy" / "grafana" / "dashboard.json").read_text()
    asked = set(re.findall(rf"\b{metrics.PREFIX}\w+", dashboard))
    assert asked <= names
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} == families
    operations = (ROOT / "docs" / "operations.md").read_text()
    described = set(re.findall(rf"^\| `({metrics.PREFIX}\w+)`", operations, re.MULTILINE))
    assert described == families


def test_the_dashboard_is_whole() -> None:
    """Panels do not overlap, ids are unique, and each asks the data source that was chosen."""
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in panels)
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24  # columns of Grafana's grid
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in panels:
        assert panel["description"]
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, target["expr"]
