"""End to end on CPU: the real SGLang server, two EP ranks through the plugin, against stock."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from moe_plugin.integration.serve.metrics import PREFIX

from ..support.hosts import program
from ..support.serving.checkpoint import Shape
from ..support.serving.compare import check_equal, uncounted_layers
from ..support.serving.fixture_plugin import write_plugin
from ..support.serving.prompts import LONG_PROMPT, NEW_TOKENS, PROMPTS, SHORT_PROMPTS
from ..support.serving.server import COMMON_ARGS, TWO_EP_RANKS, Server

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]

BUDGET = 256  # the default: no flag about sizes is given

DECODE_LOG_INTERVAL = 40  # steps; the host's default

PROCESSES = 5  # launcher, data-parallel controller, two schedulers, detokenizer


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of ``served`` leave their records."""
    return tmp_path_factory.mktemp("probes")


@pytest.fixture(scope="module")
def served(
    model: Path, stock: list[dict], probes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Two EP ranks through the plugin; ``stock`` first, so that one server runs at a time."""
    folder = tmp_path_factory.mktemp("probe")
    env = write_plugin(folder, "probe", program("plugin_probe"), {"sglang.srt.plugins": "register"})
    env |= {"PROBE_DIR": str(probes)}
    args = (*COMMON_ARGS, *TWO_EP_RANKS, "--use-batched-dp-moe", "on", "--enable-metrics")
    with Server(args, model, ranks=2, env=env) as server:
        yield server.wait_ready()


def test_tokens_and_logprobs_equal_the_stock_host(served: Server, stock: list[dict]) -> None:
    """Every prompt has 32 or more tokens, one is far longer than the budget."""
    assert min(len(prompt) for prompt in PROMPTS) >= 32
    assert len(LONG_PROMPT) > 5 * BUDGET
    check_equal([served.generate(prompt, NEW_TOKENS) for prompt in PROMPTS], stock)


def test_32_concurrent_requests_equal_the_stock_host(served: Server, stock: list[dict]) -> None:
    """Both ranks busy, batches mixed: the same answers."""
    many = [SHORT_PROMPTS[i % len(SHORT_PROMPTS)] for i in range(32)]
    answers = served.generate_many(many, NEW_TOKENS, concurrency=32)
    check_equal(answers, [stock[i % len(SHORT_PROMPTS)] for i in range(32)])


def test_an_idle_rank_takes_part(served: Server, stock: list[dict]) -> None:
    """One request keeps one rank busy; the other still runs every layer, with no rows."""
    before = {s["tp_rank"]: s["model_forwards"] for s in served.states()}
    check_equal([served.generate(PROMPTS[0], NEW_TOKENS)], stock[:1])
    after = {s["tp_rank"]: s["model_forwards"] for s in served.states()}
    steps = {rank: after[rank] - before[rank] for rank in after}
    assert steps[0] == steps[1] >= NEW_TOKENS


def test_every_layer_forward_went_through_our_runner(served: Server) -> None:
    """Per layer and rank, read over HTTP from each scheduler, against the host's own count."""
    states = served.states()
    assert sorted(state["tp_rank"] for state in states) == [0, 1]
    assert uncounted_layers(states, Shape().num_hidden_layers) == []
    assert all(state["model_forwards"] > 0 for state in states)


def test_no_dispatch_was_larger_than_the_plan(served: Server) -> None:
    """Rows per forward mode stay within T, and the long prompt really filled the budget."""
    served.generate(LONG_PROMPT, 2)
    states = served.states()
    for state in states:
        assert state["plan"]["max_dispatch_tokens_per_rank"] == BUDGET
        assert set(state["max_rows"]) == {"extend", "decode"}
        assert max(state["max_rows_any_rank"].values()) <= BUDGET
    assert max(state["max_rows"]["extend"] for state in states) == BUDGET


def _samples(server: Server) -> list[Sample]:
    families = text_string_to_metric_families(server.scrape())
    return [sample for family in families for sample in family.samples]


def test_prometheus_reads_the_counts_of_each_scheduler(served: Server) -> None:
    """Steps are the host's own count of forwards, each rank's with its own labels."""
    served.generate(LONG_PROMPT, 2)
    states, samples = served.states(), _samples(served)

    def values(state: dict, name: str, *labels: str) -> dict[tuple[str, ...], float]:
        rank = str(state["tp_rank"])
        found = [s for s in samples if s.name == PREFIX + name and s.labels["tp_rank"] == rank]
        return {tuple(s.labels[label] for label in labels): s.value for s in found}

    for state in states:
        assert values(state, "max_dispatch_tokens_per_rank") == {(): BUDGET}
        assert values(state, "workspace_planned_bytes") == {(): state["plan"]["workspace_bytes"]}
        assert values(state, "refusals_total") == {(): 0}
        steps = values(state, "steps_total", "mode", "execution")
        shown = {(m, how): n for m, found in state["steps"].items() for how, n in found.items()}
        assert {key: count for key, count in steps.items() if count} == shown
        assert sum(shown.values()) == state["model_forwards"]
        rows = values(state, "step_rows_ratio_bucket", "mode", "le")
        for mode in state["steps"]:
            assert rows[mode, "1.0"] == rows[mode, "+Inf"] == steps[mode, "eager"]
    fullest = [values(s, "step_rows_ratio_bucket", "mode", "le") for s in states]
    assert any(rows["extend", "0.75"] < rows["extend", "1.0"] for rows in fullest)


def test_the_dashboard_asks_for_what_is_there(served: Server) -> None:
    """Every metric of every query, and of every variable. Where Prometheus asks for OpenMetrics it
    gets the host's names without their colon."""
    served.generate(PROMPTS[0], 2 * DECODE_LOG_INTERVAL)  # some of the host's appear with its log
    there = {sample.name.replace(":", "_") for sample in _samples(served)}
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboard.json").read_text())
    variables = dashboard["templating"]["list"]
    listed = [v["query"]["query"] for v in variables if v["type"] == "query"]
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for query in (*listed, *queries):
        asked = re.findall(r"\bsglang[\w:]*(?:\[:_\])?\w+", query)
        assert asked, query
        for name in asked:
            assert name.replace("[:_]", "_").replace(":", "_") in there, query


def test_plugin_is_loaded_in_every_process(served: Server, probes: Path) -> None:
    """Launcher, both schedulers and the detokenizer; only schedulers carry runtime hooks."""
    deadline = time.monotonic() + 60
    while True:
        records = [json.loads(path.read_text()) for path in probes.glob("*.json")]
        states = [record["state"] for record in records]
        if states == ["active"] * PROCESSES or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert states == ["active"] * PROCESSES, records
    assert served.process.pid in {record["pid"] for record in records}
    runtime = [r for r in records if any("run_moe_core" in target for target in r["hooked"])]
    assert len(runtime) >= 2  # one per rank
    assert any(r["detokenizer"] and r not in runtime for r in records)
