"""Property-based: over random launches, ``ok`` never overruns T, and every refusal has its fix.

The oracle is not our formulas: each launch is resolved by the host's own pipeline for an H100, and
its rows come from the host's own admission (``PrefillAdder``), request pool
(``resolve_max_num_reqs``) and capture list (``get_batch_sizes_to_capture``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings

from ..support.resolving import Worker, write_models
from ..support.strategies import apply, command_line, launches

SETTINGS = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
}
Asked = tuple[dict[str, Any], dict[str, Any]]


class Host:
    """The worker, asked one launch at a time; counts what it saw."""

    def __init__(self, worker: Worker, paths: dict[str, str]) -> None:
        self._worker, self._paths = worker, paths
        self.seen: Counter[str] = Counter()

    def ask(self, launch: dict[str, Any]) -> dict[str, Any]:
        """Resolve one launch; with rows by the host's scheduling code when it is planned."""
        case = {
            "argv": command_line(launch, self._paths),
            "env": launch["env"],
            "requests": launch["requests"],
        }
        answer = self._worker.ask([case])[0]
        self.seen["ok" if answer["ok"] else "ours" if answer["errors"] else "host"] += 1
        return answer


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """One process with hooks, an H100's facts and the host's scheduling code."""
    paths = write_models(tmp_path_factory.mktemp("models"))
    worker = Worker(paths["qwen3"], oracle=True)
    yield Host(worker, paths)
    worker.close()


def _bounded_rows(launch: dict[str, Any], answer: dict[str, Any]) -> dict[str, int]:
    """Rows of the forward modes that this instance runs in the batched layout."""
    modes = answer["plan"]["capability"]["modes"]
    role = launch["flags"].get("--disaggregation-mode")
    rows = {}
    for name, value in answer["rows"].items():
        decode = name.startswith("decode")
        runs = role != ("prefill" if decode else "decode")
        if runs and ("decode" if decode else "extend") in modes:
            rows[name] = value
    return rows


def _check(host: Host, launch: dict[str, Any]) -> None:
    answer = host.ask(launch)
    if answer["ok"]:
        event("ok" if answer["plan"] else "not batched")
        if answer["plan"]:
            tokens = answer["plan"]["max_dispatch_tokens_per_rank"]
            rows = _bounded_rows(launch, answer)
            assert all(value <= tokens for value in rows.values()), (rows, tokens)
            assert int(answer["environment"].get(_CAPACITY, launch["env"].get(_CAPACITY))) == tokens
        return
    if not answer["errors"]:
        event("refused by the host")
        # Our fills must never be what the host trips over.
        assert answer["type"] in ("ValueError", "NotImplementedError"), answer["error"]
        return
    event("refused")
    # The host sizes memory after planning, so what does not fit the device is a refusal of its own,
    # and its smaller T may meet explicit values again. Everything else is fixed in one go.
    fixed = answer
    memory = any(error["limit"] == "device memory" for error in answer["errors"])
    for _ in range(5):
        changes = [change for error in fixed["errors"] for change in error["changes"]]
        launch = apply(launch, changes)
        fixed = host.ask(launch)
        memory |= any(error["limit"] == "device memory" for error in fixed.get("errors", ()))
        if fixed["ok"] or not memory:
            break
    assert fixed["ok"], f"{answer['error']}\nafter the fix: {fixed['error']}"


_CAPACITY = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"


def test_ok_holds_and_refusals_have_fixes(host: Host) -> None:
    """500 launches."""

    @settings(max_examples=500, **SETTINGS)
    @given(launches())
    def run(launch: dict[str, Any]) -> None:
        _check(host, launch)

    run()
    # The strategy must not drown in launches that prove nothing.
    assert host.seen["ok"] > 250
    assert host.seen["ours"] > 50
    assert host.seen["host"] < 50


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_ok_holds_and_refusals_have_fixes_at_length(host: Host) -> None:
    """10,000 launches."""

    @settings(max_examples=10_000, **SETTINGS)
    @given(launches())
    def run(launch: dict[str, Any]) -> None:
        _check(host, launch)

    run()
