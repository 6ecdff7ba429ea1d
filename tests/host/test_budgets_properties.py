"""Property-based: over random launches ``ok`` is true, refusals are, and every fix is one.

The oracle is not our formulas: each launch is resolved by the host's own pipeline for a device, its
rows come from the host's own admission (``PrefillAdder``), request pool (``resolve_max_num_reqs``)
and capture list, and its experts, weights and KV cache from the model that the host's own loader
builds (:mod:`..support.built_model`). What holds is in :mod:`..support.launch_checks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from ..support.checkpoints import write_checkpoints
from ..support.launch_checks import check
from ..support.random_launches import command_line, random_launch
from ..support.resolving import Worker


class Host:
    """One worker per device, asked one launch at a time; counts what became of them."""

    def __init__(self, paths: dict[str, str]) -> None:
        self._paths, self._workers = paths, dict[str, Worker]()
        self.seen: Counter[str] = Counter()

    def ask(self, launch: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Resolve one launch; with rows by the host's scheduling code when it is planned."""
        device = launch["device"]
        if device not in self._workers:
            model = next(iter(self._paths.values()))
            self._workers[device] = Worker(model, device, oracle=True)
        case = {
            "argv": command_line(launch, self._paths),
            "env": launch["env"],
            "requests": launch["requests"],
            **more,
        }
        return self._workers[device].ask([case])[0]

    def faults(self, seeds: Iterable[int], devices: tuple[str, ...]) -> list[str]:
        """What does not hold of the launches with these seeds, each with its command line."""
        found = []
        for seed in seeds:
            launch = random_launch(seed, devices)
            became, faults = check(launch, self.ask)
            self.seen[became] += 1
            if faults:
                typed = " ".join(command_line(launch, self._paths)[2:])
                where = f"{seed}: {launch['device']} {launch['model']} {typed} {launch['env']}"
                found.append("\n  ".join((where, *faults)))
        return found

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers.values():
            worker.close()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Processes with hooks, a device's facts and the host's scheduling and model code."""
    found = Host(write_checkpoints(tmp_path_factory.mktemp("models")))
    yield found
    found.close()


@pytest.mark.timeout(1800)
def test_ok_holds_and_refusals_have_fixes(host: Host) -> None:
    """200 launches."""
    faults = host.faults(range(200), ("h100", "b200"))
    assert not faults, "\n".join(faults[:10])
    # Launches that prove nothing must not drown the others.
    assert host.seen["ok"] > 30
    assert host.seen["refused"] > 50
    assert host.seen["host"] < 40


@pytest.mark.slow
@pytest.mark.timeout(14400)
@pytest.mark.parametrize("device", ["h100", "h200", "b200", "a100"])
def test_ok_holds_and_refusals_have_fixes_at_length(host: Host, device: str) -> None:
    """10,000 launches."""
    start = 10_000 + 2_500 * ("h100", "h200", "b200", "a100").index(device)
    faults = host.faults(range(start, start + 2_500), (device,))
    assert not faults, "\n".join(faults[:10])
