"""Stage `rounds` of the serving benchmark, with stand-ins for servers and clients."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path += [
    str(Path(__file__).parents[2] / "benchmarks" / "serving"),
    str(Path(__file__).parents[2] / "benchmarks"),
    str(Path(__file__).parents[1] / "support"),
]
import loads
import rounds
import servers
from serving.server import ServerDied

PREFILL = "[x] Prefill batch, #new-seq: 1, #new-token: 9, cuda graph: {}, input throughput\n"


class StandIn(servers.Detached):
    """A server that is a log; it fails after so many rounds."""

    def __init__(self, name: str, folder: Path, rounds_to_live: int = 1000) -> None:
        log = folder / f"{name}.log"
        log.write_text(PREFILL.format(False))  # from before the first round
        super().__init__(servers.Record(name, name, [], 1, 1, str(log), str(folder), False))
        self.rounds_to_live = rounds_to_live

    def idle(self) -> None:
        self.rounds_to_live -= 1
        if self.rounds_to_live < 0:
            raise ServerDied("requests do not end")


class Clients:
    """Answers at once; every round is a replayed prefill batch and an eager one."""

    up: dict[str, StandIn]
    asked: list[rounds.Job]

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing runs."""

    def round(self, job: rounds.Job) -> dict[str, Any]:
        self.asked.append(job)
        for server in self.up.values():
            with Path(server.record.log).open("a") as file:
                file.write(PREFILL.format(True) + PREFILL.format(False))
        return {"tokens_per_s": 1.0, "lost": 0, "waiting": 2}


class Bench:
    """What the stage needs of a command."""

    stamp = "1"
    left_s_value = 1e9

    def __init__(self, points: list[str], variants: list[str], **options: Any) -> None:
        self.points = loads.parse(points)
        self.report: dict[str, Any] = {}
        chosen = {"rounds": 2, "seconds": 10.0, "lead": None, "warm": False, "seldom": [],
                  "seldom_rounds": 1, "stream_interval": 8, "work": None}  # fmt: skip
        self.options = argparse.Namespace(variants=variants, **chosen | options)

    def left_s(self) -> float:
        return self.left_s_value

    def save(self) -> None:
        """Nowhere."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the stage against stand-ins; returns its report and the jobs that clients got."""

    def stage(bench: Bench, *up: StandIn) -> SimpleNamespace:
        Clients.up = {server.record.variant: server for server in up}
        Clients.asked = []
        monkeypatch.setattr(rounds, "load_state", lambda work: list(up))
        monkeypatch.setattr(rounds, "Clients", Clients)
        rounds.stage_rounds(bench)  # type: ignore[arg-type]
        return SimpleNamespace(report=bench.report, asked=Clients.asked)

    return stage


def test_every_point_has_a_round_before_the_next_ones(run: Any, tmp_path: Path) -> None:
    """And the variants change their order with each; a point's rivals share their prompts."""
    bench = Bench(["chat/4", "chat/2", "chat@2"], ["b", "c"])
    found = run(bench, StandIn("b", tmp_path), StandIn("c", tmp_path))
    order = [(row["point"], row["variant"]) for row in found.report["rounds"]]
    points = ("chat/4", "chat/2", "chat@2")
    assert order[:6] == [(point, name) for point in points for name in "bc"]
    assert order[6:] == [(point, name) for point in points for name in "cb"]
    warm_up, measured = found.asked[:2], found.asked[2:]
    assert [len(job.workers) for job in warm_up] == [4, 4]  # the largest point of the load
    assert all(one.seed == two.seed for one, two in zip(measured[::2], measured[1::2], strict=True))
    assert len({job.seed for job in measured}) == 6
    assert measured[4].rate == 2.0
    assert {job.lead_s for job in measured} == {loads.LOADS["chat"].lead_s}
    first = found.report["rounds"][0]
    assert (first["prefill_batches"], first["prefill_eager"]) == (2, 1)


def test_a_server_that_fails_takes_part_in_no_more_rounds(run: Any, tmp_path: Path) -> None:
    """What it was asked for is lost, and the others are measured on."""
    bench = Bench(["2", "4"], ["b", "c"], warm=True)
    found = run(bench, StandIn("b", tmp_path, rounds_to_live=1), StandIn("c", tmp_path))
    mine = [row for row in found.report["rounds"] if row["variant"] == "b"]
    assert [(row["point"], row["lost"]) for row in mine] == [("short/2", 0), ("short/4", 2)]
    assert sum(row["variant"] == "c" for row in found.report["rounds"]) == 4
    (failure,) = found.report["failed"]
    assert "b at 1/short/4/0" in failure


def test_no_round_begins_that_would_outlast_the_command(run: Any, tmp_path: Path) -> None:
    bench = Bench(["2"], ["b", "c"], warm=True)
    bench.left_s_value = 2 * 10.0
    began = time.monotonic()
    found = run(bench, StandIn("b", tmp_path), StandIn("c", tmp_path))
    assert found.report["rounds"] == []
    assert found.report["skipped"] == ["from round 0 at short/2: no time"]
    assert time.monotonic() - began < 10


def test_seldom_variants_run_in_the_first_rounds(run: Any, tmp_path: Path) -> None:
    bench = Bench(["2"], ["a", "c", "gone"], warm=True, seldom=["a"])
    found = run(bench, StandIn("a", tmp_path), StandIn("c", tmp_path))
    assert [row["variant"] for row in found.report["rounds"]] == ["a", "c", "c"]
