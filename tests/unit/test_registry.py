"""The capability registry: one predicate, registrable, with reasons."""

from __future__ import annotations

import pytest

from moe_plugin import (
    BatchedBackend,
    CapabilityFacts,
    ConfigError,
    Limits,
    Mode,
    backend_names,
    get_backend,
    register_backend,
    unregister_backend,
    use_batched_dp_moe,
)

BOTH = frozenset(Mode)
DECODE = frozenset({Mode.DECODE})


@pytest.mark.parametrize(
    ("facts", "modes", "reason"),
    [
        (
            {"a2a_backend": "deepep", "deepep_mode": "low_latency"},
            BOTH,
            "batches decode and extend",
        ),
        (
            {"a2a_backend": "deepep", "deepep_mode": "auto"},
            DECODE,
            "the model has routed MoE layers and deepep batches decode",
        ),
        (
            {"a2a_backend": "deepep", "deepep_mode": "auto", "disaggregation_mode": "decode"},
            DECODE,
            "deepep batches decode",
        ),
        (
            {"a2a_backend": "deepep", "deepep_mode": "auto", "disaggregation_mode": "prefill"},
            None,
            "(deepep_mode=auto, disaggregation_mode=prefill)",
        ),
        ({"a2a_backend": "deepep", "deepep_mode": "normal"}, None, "(deepep_mode=normal,"),
        ({"a2a_backend": "none"}, None, "all-to-all backend none is not batched"),
        (
            {"a2a_backend": "flashinfer", "deepep_mode": "low_latency"},
            None,
            "all-to-all backend flashinfer is not batched",
        ),
        (
            {"a2a_backend": "deepep", "deepep_mode": "low_latency", "has_routed_moe": False},
            None,
            "neither the model nor its draft has a routed MoE layer",
        ),
        (
            {
                "a2a_backend": "none",
                "deepep_mode": "low_latency",
                "has_routed_moe": False,
                "draft_has_routed_moe": True,
                "draft_a2a_backend": "deepep",
            },
            BOTH,
            "the draft model has routed MoE layers",
        ),
    ],
)
def test_answer_has_modes_and_a_reason(
    facts: dict, modes: frozenset[Mode] | None, reason: str
) -> None:
    """Never a bare bool; a refusal has no modes, an acceptance names its backend."""
    answer = use_batched_dp_moe(CapabilityFacts(**facts))
    assert answer.ok == (modes is not None)
    assert answer.modes == (modes or frozenset())
    assert reason in answer.reason
    if answer.ok:
        assert answer.backend == "deepep"


def test_prefill_only_instance_in_low_latency_mode_extends_only() -> None:
    """The modes are those that this instance runs."""
    facts = CapabilityFacts(
        a2a_backend="deepep", deepep_mode="low_latency", disaggregation_mode="prefill"
    )
    assert use_batched_dp_moe(facts).modes == {Mode.EXTEND}


def test_third_party_backend_answers_with_its_own_limits() -> None:
    """Registered from code: the predicate and the limits are the backend's."""
    backend = BatchedBackend(
        name="mori", batched_modes=lambda _facts: DECODE, limits=Limits(default_max_tokens=64)
    )
    register_backend(backend)
    try:
        answer = use_batched_dp_moe(CapabilityFacts(a2a_backend="mori"))
        assert (answer.ok, answer.modes, answer.backend) == (True, DECODE, "mori")
        assert get_backend("mori").limits.default_max_tokens == 64
        assert register_backend(backend) is backend  # the same object again is harmless
        with pytest.raises(ConfigError, match="already registered"):
            register_backend(
                BatchedBackend(name="mori", batched_modes=lambda _facts: BOTH, limits=Limits())
            )
    finally:
        unregister_backend("mori")
    assert "mori" not in backend_names()


def test_unknown_names_list_what_exists() -> None:
    """One error that says what is registered."""
    with pytest.raises(ConfigError, match=r"got 'nonsense', allowed one of \['deepep'"):
        get_backend("nonsense")
    with pytest.raises(ConfigError, match="unknown batched-DP MoE backend"):
        unregister_backend("nonsense")
