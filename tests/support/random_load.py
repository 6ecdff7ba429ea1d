"""Random load on a server with several attention-DP groups, as users and networks make it.

Prompts of any length for some of the groups while the others idle, clients that leave, requests
that are aborted, flushes of the prefix cache. Whoever stays must get all tokens in time.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .serving.prompts import long_prompt
from .serving.server import Server

ANSWER_TIMEOUT_S = 120.0
"""A request that takes longer is lost: DeepEP itself gives up after about 100 s."""
CHANGE_S = 2.0
"""How long the same groups are busy."""
FATES = ("stay", "stay", "stay", "leave", "abort")


@dataclass
class RandomLoad:
    """One run of it.

    Attributes:
        server: it is up.
        ranks: attention-DP groups.
        longest: most tokens of a prompt.
        new_tokens: most tokens of an answer.
        clients: requests at once, at most.
        seed: of everything that is drawn.
        more: fields of every request.
        counts: requests by their fate, and flushes.
        problems: what went wrong; empty after a good run.
    """

    server: Server
    ranks: int
    longest: int
    new_tokens: int
    clients: int
    seed: int = 0
    more: Mapping[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _busy: tuple[int, ...] = ()
    _over: threading.Event = field(default_factory=threading.Event)

    def run(self, seconds: float, steps: int) -> dict[str, Any]:
        """Load until every rank has made ``steps`` more steps, or time is over.

        Returns:
            Seconds, steps of each rank, requests by fate, and problems.
        """
        began, before = time.monotonic(), self._forwards()
        self._busy = tuple(range(self.ranks))
        with ThreadPoolExecutor(self.clients) as pool:
            clients = [pool.submit(self._client, index) for index in range(self.clients)]
            try:
                self._conduct(began + seconds, before, steps)
            finally:
                self._over.set()
            for client in clients:
                client.result()
        self._flush("?timeout=30")  # waits for what was left half read: ranks are asked in turn
        made = self._steps(before)
        if len(set(made)) != 1:
            self.problems.append(f"steps of the ranks: {made}")
        return {
            "seconds": round(time.monotonic() - began, 1),
            "steps": made,
            "requests": dict(self.counts),
            "problems": self.problems,
        }

    def _conduct(self, deadline: float, before: dict[int, int], steps: int) -> None:
        """Change who is busy, flush at times, and look at how far the ranks are."""
        rng = random.Random(self.seed)
        while time.monotonic() < deadline and not self.problems:
            time.sleep(CHANGE_S)
            some = rng.randint(1, self.ranks)
            self._busy = tuple(rng.sample(range(self.ranks), some))
            if rng.random() < 0.2:
                self._flush()
            if min(self._steps(before)) >= steps:
                return

    def _flush(self, wait: str = "") -> None:
        """While requests run the host refuses, and must live on."""
        with contextlib.suppress(urllib.error.HTTPError):
            self.server.post(f"/flush_cache{wait}", {})
        self.counts["flush"] += 1

    def _client(self, index: int) -> None:
        rng = random.Random(self.seed * 1000 + index)
        number = 0
        while not self._over.is_set() and not self.problems:
            number += 1
            rid, fate = f"load-{index}-{number}", rng.choice(FATES)
            try:
                self._request(rid, fate, rng)
            except Exception as error:
                self.problems.append(f"{rid}, {fate}: {error!r}")
            self.counts[fate] += 1
            time.sleep(rng.choice((0, 0, 0.05, 0.5)))

    def _request(self, rid: str, fate: str, rng: random.Random) -> None:
        tokens = round(math.exp(rng.uniform(0, math.log(self.longest))))
        start = rng.randrange(1000)
        body = {
            "rid": rid,
            "text": long_prompt(start + tokens)[start:],
            "routed_dp_rank": rng.choice(self._busy),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": rng.randint(1, self.new_tokens),
                "ignore_eos": True,
            },
            "stream": True,
            **self.more,
        }
        wanted = body["sampling_params"]["max_new_tokens"]
        stop_after = wanted if fate == "stay" else rng.randint(1, wanted)
        aborted, last = False, {}
        request = urllib.request.Request(
            self.server.url + "/generate",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as reply:
            for line in reply:
                if not line.startswith(b"data: {"):
                    continue
                last = json.loads(line.removeprefix(b"data: "))
                if last["meta_info"]["completion_tokens"] < stop_after or aborted:
                    continue
                if fate == "leave":
                    return  # the socket closes with the answer half read
                if fate == "abort":
                    self.server.post("/abort_request", {"rid": rid})
                    aborted = True
        got = last["meta_info"]["completion_tokens"]
        if fate == "stay" and got != wanted:
            self.problems.append(f"{rid}: {got} of {wanted} tokens, {last['meta_info']}")

    def _forwards(self) -> dict[int, int]:
        return {state["tp_rank"]: state["model_forwards"] for state in self.server.states()}

    def _steps(self, before: dict[int, int]) -> list[int]:
        return [now - before[rank] for rank, now in sorted(self._forwards().items())]
