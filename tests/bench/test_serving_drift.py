"""Stage `drift` of the serving benchmark, against a stand-in server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path += [
    str(Path(__file__).parents[2] / "benchmarks" / "serving"),
    str(Path(__file__).parents[2] / "benchmarks"),
    str(Path(__file__).parents[1] / "support"),
]
import drift

LACKING = 0.5


class StandIn:
    """Answers any prompt with the numbers after its last token; `wrong` shifts the fourth one.

    It finds the token after each one likeliest, and any other one LACKING less likely.
    """

    def __init__(self, wrong: int = 0, short: bool = False) -> None:
        self.wrong, self.short = wrong, short

    def idle(self) -> None:
        """Nothing runs."""

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        assert path == "/generate"
        ids, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        if body.get("return_logprob"):
            return {"meta_info": _read(ids, body["logprob_start_len"])}
        tokens = [ids[-1] + step + 1 for step in range(count - self.short)]
        if len(tokens) > 3:
            tokens[3] += self.wrong
        return {"output_ids": tokens}


def _read(ids: list[int], start: int) -> dict[str, Any]:
    chosen: list[Any] = [[None, ids[start], None]]
    best: list[Any] = [None]
    for before, token in zip(ids[start:], ids[start + 1 :], strict=False):
        likeliest = -1.0
        chosen.append([likeliest if token == before + 1 else likeliest - LACKING, token, None])
        best.append([[likeliest, before + 1, None]])
    return {"input_token_logprobs": chosen, "input_top_logprobs": best}


def test_answers_that_stay_have_no_regret() -> None:
    server: Any = StandIn()
    alone = drift.answers_alone(server, 8)
    loaded = drift.answers_under_load(server, 32)
    assert sorted(index for index, _ in loaded) == list(range(32))
    found = drift.kept(loaded, alone)
    assert found == {
        "answers": 32,
        "first token kept": 1.0,
        "tokens kept": {"mean": 1.0, "standard error": 0.0},
    }
    assert drift.regret(server, loaded) == {"mean": 0.0, "standard error": 0.0}


def test_wrong_tokens_are_seen() -> None:
    reader: Any = StandIn()
    server: Any = StandIn(wrong=1)
    alone = drift.answers_alone(reader, 8)
    wrong = drift.answers_alone(server, 8)
    found = drift.kept(wrong, alone)
    assert found["first token kept"] == 1.0
    assert found["tokens kept"]["mean"] == pytest.approx(3 / drift.COMPARED, abs=1e-4)
    readable = [answer for answer in wrong if max(answer[1]) < drift.READABLE]
    assert readable
    # The reader expects neither the shifted token nor the one after it.
    assert drift.regret(reader, readable)["mean"] == 2 * LACKING / drift.COMPARED


def test_answers_that_end_short_are_refused() -> None:
    server: Any = StandIn(short=True)
    with pytest.raises(RuntimeError, match="15 of 16 tokens"):
        drift.answers_alone(server, 1)


def test_unreadable_tokens_are_left_out() -> None:
    reader: Any = StandIn()
    last = drift.prompt(0)[-1]
    readable = list(range(last + 1, last + 4))
    assert drift.regret(reader, [(0, [*readable, drift.READABLE])])["mean"] == 0.0
