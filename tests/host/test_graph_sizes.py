"""Sizes of CUDA graphs, by flag, list and JSON: kept, held to T, and refused as they were typed."""

from __future__ import annotations

import json
import shlex

import pytest

from ..support.resolving import LL, Launch

TP8 = ("--tp-size", "8", "--attn-dp-size", "8")
T256 = ("--batched-dp-moe-max-tokens", "256")
GRAPHS = "--cuda-graph-config"


def test_explicit_graph_sizes_are_kept(launch: Launch) -> None:
    """Both phases, by flag, list and JSON."""
    answer = launch(
        *TP8, *LL, "--cuda-graph-bs-decode", "1", "8", "16", "--cuda-graph-max-bs-prefill", "64"
    )
    assert answer["decode"]["bs"] == [1, 8, 16]
    assert answer["prefill"]["max_bs"] == 64
    json_flag = '{"decode": {"max_bs": 32}, "prefill": {"backend": "disabled"}}'
    answer = launch(*TP8, *LL, "--cuda-graph-config", json_flag)
    assert answer["decode"]["max_bs"] == 32
    assert answer["prefill"]["backend"] == "disabled"


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (
            ("--cuda-graph-max-bs-decode", "0"),
            [["--cuda-graph-max-bs-decode", None], ["--disable-decode-cuda-graph", ""]],
        ),
        (
            ("--cuda-graph-backend-prefill", "full", "--cuda-graph-max-bs-prefill", "0"),
            [["--cuda-graph-max-bs-prefill", None], ["--disable-prefill-cuda-graph", ""]],
        ),
        (
            ("--cuda-graph-max-bs-prefill", "3"),
            [["--cuda-graph-max-bs-prefill", "8"]],
        ),
        (
            ("--cuda-graph-bs-decode", "3", "5"),
            [["--cuda-graph-bs-decode", "2"]],
        ),
    ],
)
def test_sizes_that_leave_nothing_to_capture_are_refused(
    launch: Launch, flags: tuple[str, ...], changes: list[list[str | None]]
) -> None:
    """The host asserts on them after the weights, or in its first prefill.

    Two attention-TP ranks share a decode batch: odd sizes are dropped.
    """
    answer = launch("--tp-size", "2", *LL, *flags)
    assert [error["changes"] for error in answer["errors"]] == [changes]


GRAPHS = "--cuda-graph-config"


@pytest.mark.parametrize(
    ("typed", "told", "instead"),
    [
        (
            ("--cuda-graph-bs-decode", "1", "8", "4096"),
            "--cuda-graph-bs-decode 1 8 4096: 4096 = 4096 rows per rank",
            ("--cuda-graph-bs-decode", "1", "8", "256"),
        ),
        (
            (GRAPHS, '{"decode": {"bs": [1, 4096], "max_bs": 4096}, "prefill": {"max_bs": 4096}}'),
            '--cuda-graph-config {"decode": {"bs": [1, 4096]}}: 4096 = 4096 rows per rank',
            (GRAPHS, '{"decode": {"bs": [1, 256], "max_bs": 256}, "prefill": {"max_bs": 256}}'),
        ),
        (
            ("--cuda-graph-bs-decode", "1", "4096", GRAPHS, '{"decode": {"max_bs": 4096}}'),
            "--cuda-graph-bs-decode 1 4096: 4096 = 4096 rows per rank",
            ("--cuda-graph-bs-decode", "1", "256", GRAPHS, '{"decode": {"max_bs": 256}}'),
        ),
        (
            (GRAPHS, '{"decode": {"max_bs": 0}, "prefill": {"max_bs": 64}}'),
            '--cuda-graph-config {"decode": {"max_bs": 0}}: 0, which leaves graphs on',
            (GRAPHS, '{"prefill": {"max_bs": 64}}', "--disable-decode-cuda-graph"),
        ),
        (
            (GRAPHS, '{"decode": {"max_bs": 0}}'),
            '--cuda-graph-config {"decode": {"max_bs": 0}}: 0, which leaves graphs on',
            ("--disable-decode-cuda-graph",),
        ),
    ],
)
def test_sizes_are_refused_in_the_words_in_which_they_were_typed(
    launch: Launch, typed: tuple[str, ...], told: str, instead: tuple[str, ...]
) -> None:
    """A list, and JSON, win over the flag that the plan speaks of: the fix is made where they are,
    and with it the launch is not refused."""
    answer = launch(*TP8, *LL, *T256, *typed)
    assert any(told in error["got"] for error in answer["errors"])
    words = {word for error in answer["errors"] for word in shlex.split(error["fix"])}
    assert set(instead) <= words
    assert launch(*TP8, *LL, *T256, *instead)["ok"]


@pytest.mark.parametrize(
    ("role", "typed", "phase", "fix"),
    [
        (
            "decode",
            ("--cuda-graph-backend-prefill", "breakable", "--cuda-graph-bs-prefill", "8192"),
            "prefill",
            "--cuda-graph-bs-prefill 256",
        ),
        (
            "prefill",
            ("--cuda-graph-backend-decode", "full", "--cuda-graph-max-bs-decode", "512"),
            "decode",
            "--cuda-graph-max-bs-decode 256",
        ),
    ],
)
def test_a_phase_of_another_role_is_held_to_t_where_its_graphs_are_asked_for(
    launch: Launch, role: str, typed: tuple[str, ...], phase: str, fix: str
) -> None:
    """The host captures them then, and leaves them out otherwise."""
    argv = (*TP8, *LL, *T256, "--disaggregation-mode", role)
    (error,) = launch(*argv, *typed)["errors"]
    assert error["fix"] == fix
    answer = launch(*argv, *typed[:2])
    assert answer["ok"]
    assert max(answer[phase]["bs"]) <= 256
    assert launch(*argv)[phase]["backend"] == "disabled"


@pytest.mark.parametrize(
    ("sizes", "allowed"),
    [
        ({"max_bs": "abc"}, "a whole number"),
        ({"bs": "4096"}, "a list of whole numbers"),
        ({"bs": 5}, "a list of whole numbers"),
    ],
)
def test_mistyped_sizes_of_graphs_are_one_refusal(
    launch: Launch, sizes: dict[str, object], allowed: str
) -> None:
    """Not a fault of the plugin."""
    answer = launch(*TP8, *LL, GRAPHS, json.dumps({"decode": sizes}))
    assert len(answer["errors"]) == 1
    assert f"allowed {allowed}." in answer["error"]


def test_a_list_of_prefill_sizes_is_counted_as_the_host_rounds_it(launch: Launch) -> None:
    """To eights, also where a largest size as small would leave nothing."""
    answer = launch("--tp-size", "2", *LL, "--cuda-graph-bs-prefill", "2")
    assert answer["prefill"]["bs"] == [8]
    assert answer["plan"]["cuda_graph_max_bs_prefill"] == 8
