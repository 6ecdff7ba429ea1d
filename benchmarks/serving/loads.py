"""What is asked of the servers: named loads, and the points at which each is measured.

A point is written ``chat/64`` (64 requests kept in flight), ``chat@16`` (requests arrive at random,
16 a second on average, however fast they are answered), ``chat`` (the load's own points), ``64``
(of the load ``short``) or ``all``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SLACK = 1.25  # of a KV cache over the mean of what is in flight: lengths and DP groups differ
LATENCY_S = 10.0  # of a request that arrives at random, for the size of the KV cache
_POINT = re.compile(r"(?:([a-z]+)(?:(/)(\d+)|@([\d.]+))?)|(\d+)")


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one kind; lengths are drawn from ranges, for equal ones would run in step.

    Attributes:
        name: of the load.
        prompt: least and most tokens of a prompt, a shared prefix included.
        new: least and most tokens of an answer.
        requests: how many are in flight at the points that it is measured at by default.
        shared: tokens at the beginning that a prompt has in common with others.
        lead_s: load before counting begins: until the first requests are over, or the sides are
            counted at different shares of prompts.
        patience_s: a request that waits longer for a token, when its round is over, is lost.
    """

    name: str
    prompt: tuple[int, int]
    new: tuple[int, int]
    requests: tuple[int, ...]
    shared: int = 0
    lead_s: float = 1.0
    patience_s: float = 5.0

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return self.prompt[1] + self.new[1]

    @property
    def mean(self) -> float:
        """Tokens of the mean request, prompt and answer."""
        return (sum(self.prompt) + sum(self.new)) / 2


LOADS = {
    load.name: load
    for load in (
        Load("short", (32, 128), (64, 192), (1, 64, 256), lead_s=2.5),
        Load("chat", (900, 1100), (200, 312), (1, 64, 256), lead_s=5.0, patience_s=20.0),
        Load("long", (3800, 4300), (100, 156), (1, 32), lead_s=3.0, patience_s=30.0),
        Load("deep", (1000, 31000), (192, 320), (1, 16), lead_s=4.0, patience_s=60.0),
        Load("shared", (900, 1100), (200, 312), (64,), 768, lead_s=5.0, patience_s=20.0),
    )
}


@dataclass(frozen=True, slots=True)
class Point:
    """A load with so many requests in flight, or with so many arriving a second."""

    load: Load
    requests: int = 0
    rate: float | None = None

    @property
    def name(self) -> str:
        """As it is written on the command line."""
        if self.rate is not None:
            return f"{self.load.name}@{self.rate:g}"
        return f"{self.load.name}/{self.requests}"

    @property
    def tokens(self) -> int:
        """Of the KV cache that keeps it from waiting for room, over all DP groups."""
        flying = self.requests if self.rate is None else self.rate * LATENCY_S
        return max(self.load.longest, math.ceil(SLACK * flying * self.load.mean))


OPEN_LOOP = Point(LOADS["chat"], rate=16.0)


def parse(texts: Iterable[str]) -> list[Point]:
    """Points by their names.

    Raises:
        ValueError: no such load, or not written as a point.
    """
    points: list[Point] = []
    for text in texts:
        found = _POINT.fullmatch(text)
        name = (found[1] or "short") if found else ""
        if text == "all":
            points += [p for load in LOADS.values() for p in _own(load)] + [OPEN_LOOP]
        elif found is None or name not in LOADS:
            raise ValueError(
                f"a point must be all, a number, or one of {', '.join(LOADS)}, alone or with /64 "
                f"(in flight) or @16 (a second); got {text!r}"
            )
        elif found[4]:
            points.append(Point(LOADS[name], rate=float(found[4])))
        elif number := found[3] or found[5]:
            points.append(Point(LOADS[name], int(number)))
        else:
            points += _own(LOADS[name])
    return points


def kv_tokens(points: Sequence[Point], dp_groups: int) -> int:
    """Tokens of each DP group's KV cache: in a pool of a group's own, requests divide unevenly."""
    longest = max(point.load.longest for point in points)
    total = max(point.tokens for point in points)
    share = total if dp_groups == 1 else SLACK * total / dp_groups
    return -(-max(longest, math.ceil(share)) // 1024) * 1024


def _own(load: Load) -> list[Point]:
    return [Point(load, requests) for requests in load.requests]
