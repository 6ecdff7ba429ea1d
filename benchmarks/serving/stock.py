"""Stage `stock`: launches that fail on the stock host, with and without our flag.

Rows of the failing-launch table that one GPU can show. The launches run side by side on models of
two layers; each is asked for one prompt longer than the buffer once it says that it is ready.
"""

from __future__ import annotations

import re
import time
import urllib.error
from dataclasses import dataclass
from typing import Any

import startup
from common import Bench
from servers import Detached
from serving.prompts import long_prompt
from serving.shared_models import shared_model
from variants import DEEPEP, ON, STOCK_ENV, Variant

PROMPT_TOKENS = 1000
SHARED_S = 150.0
_ERROR = re.compile(r"(Error|Exception|Assertion|[Aa]ssert|Failed|failed)\b")


@dataclass(frozen=True)
class Row:
    """One launch: what it shows, its model, the flags that both hosts get, those of ours."""

    title: str
    model: str
    args: tuple[str, ...] = ()


ROWS = (
    Row("FP8 experts, no sizes given", "qwen3-fp8-2"),
    Row(
        "FP8 experts, --cuda-graph-max-bs-decode 128",
        "qwen3-fp8-2",
        ("--cuda-graph-max-bs-decode", "128"),
    ),
    Row("bf16 experts, runner auto", "qwen3-bf16-2", ("--cuda-graph-max-bs-decode", "128")),
)


def stage_stock(bench: Bench) -> None:
    """Every row on the stock host, then every row on ours, each set at once."""
    outcomes: list[dict[str, Any]] = []
    bench.report["stock"] = outcomes
    logs = []
    hosts = [("stock", DEEPEP, STOCK_ENV), ("ours", ON, {})]
    for host, flags, env in hosts if "c" in bench.options.variants else hosts[:1]:
        servers = []
        for index, row in enumerate(ROWS):
            launched = Variant(f"{host}-{index}", row.title, (*flags, *row.args), env)
            args = bench.shared_args(launched)
            servers.append(bench.launch(launched, shared_model(row.model), args))
        try:
            outcomes += _outcomes(host, servers, min(bench.options.timeout, SHARED_S))
            bench.save()
        finally:
            for server in servers:
                server.stop()
                logs.append(f"== {host}: {server.record.title}\n{server.tail(60_000)}")
    (bench.options.out / f"serving-stock-{bench.stamp}.log").write_text("\n".join(logs))
    for outcome in outcomes:
        print(_text(outcome))


def _text(outcome: dict[str, Any]) -> str:
    return "{host:<6}{title:<46}{outcome} {line}".format(**outcome)


def _outcomes(host: str, servers: list[Detached], timeout_s: float) -> list[dict[str, Any]]:
    watches = [startup.Watch(server, time.monotonic()) for server in servers]
    ended: dict[int, str] = {}
    deadline = time.monotonic() + timeout_s
    while len(ended) < len(watches) and time.monotonic() < deadline:
        for index, watch in enumerate(watches):
            if index in ended:
                continue
            alive = watch.server.alive()
            watch.read()
            after = time.monotonic() - watch.began
            if not alive:
                ended[index] = f"dies after {after:.0f} s"
            elif watch.fired_up():
                ended[index] = _ask(watch, after)
        time.sleep(0.1)
    found = []
    for index, watch in enumerate(watches):
        outcome = ended.get(index, f"neither ready nor dead after {timeout_s:.0f} s")
        line = _last_error(watch) if "served" not in outcome else ""
        title, args = watch.server.record.title, watch.server.record.args
        found.append({"host": host, "title": title, "outcome": outcome, "line": line, "args": args})
    return found


def _ask(watch: startup.Watch, after: float) -> str:
    """A launch that is ready is asked for a prompt longer than any buffer."""
    try:
        answer = watch.server.generate(long_prompt(PROMPT_TOKENS), 8)
    except (urllib.error.URLError, OSError, KeyError, ValueError):
        watch.read()
        died = time.monotonic() - watch.began
        return f"ready after {after:.0f} s, dies on a prompt of {PROMPT_TOKENS} after {died:.0f} s"
    complete = len(answer["tokens"]) == 8
    word = "served" if complete else "not answered"
    return f"ready after {after:.0f} s, a prompt of {PROMPT_TOKENS} is {word}"


def _last_error(watch: startup.Watch) -> str:
    watch.read()
    found = [line for _, line in watch.lines if _ERROR.search(line) and "child" not in line]
    return found[-1].strip()[-300:] if found else ""
