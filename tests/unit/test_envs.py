"""Flags and variables: one parser each, bad values raise with the fix."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

from moe_plugin import ConfigError, envs
from moe_plugin.integration import flags


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in envs.VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


def _parse(*argv: str) -> flags.Request:
    parser = argparse.ArgumentParser()
    flags.add_cli_args(lambda parser: None, parser)
    record = flags.from_cli_args(
        lambda cls, args: SimpleNamespace(), object, parser.parse_args(argv)
    )
    return flags.requested(record)


@pytest.mark.parametrize(
    ("word", "switch"),
    [("auto", "auto"), ("on", "on"), ("off", "off"), ("true", "on"), ("false", "off")],
)
def test_switch_words(word: str, switch: str) -> None:
    """YAML's booleans mean on and off."""
    assert _parse("--use-batched-dp-moe", word).switch == switch


def test_defaults() -> None:
    """Nothing given: auto, no explicit capacity, and both say so."""
    assert _parse() == flags.Request("auto", None, "default", "default")


def test_flags_win_over_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables stand in for flags where there is no command line."""
    monkeypatch.setenv("MOE_PLUGIN_USE_BATCHED_DP_MOE", "on")
    monkeypatch.setenv("MOE_PLUGIN_MAX_TOKENS", "64")
    assert flags.requested(SimpleNamespace()) == flags.Request(
        "on", 64, "MOE_PLUGIN_USE_BATCHED_DP_MOE", "MOE_PLUGIN_MAX_TOKENS"
    )
    request = _parse("--use-batched-dp-moe", "off", "--batched-dp-moe-max-tokens", "128")
    assert (request.switch, request.max_tokens) == ("off", 128)
    assert request.max_tokens_source == "--batched-dp-moe-max-tokens"


@pytest.mark.parametrize(
    "argv",
    [
        ("--batched-dp-moe-max-tokens", "0"),
        ("--batched-dp-moe-max-tokens", "-5"),
        ("--batched-dp-moe-max-tokens", "many"),
        ("--use-batched-dp-moe", "maybe"),
        ("--use-batched-dp-moe",),
    ],
)
def test_bad_flags_are_usage_errors(
    argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """argparse exits with 2 and our message."""
    with pytest.raises(SystemExit) as exit_info:
        _parse(*argv)
    assert exit_info.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("MOE_PLUGIN_MAX_TOKENS", "0", "MOE_PLUGIN_MAX_TOKENS: .*got '0', allowed an integer >= 1"),
        ("MOE_PLUGIN_USE_BATCHED_DP_MOE", "yes please", "allowed auto, on or off"),
        ("MOE_PLUGIN_TRANSPORT", "carrier-pigeon", "allowed auto, deepep, torch"),
        ("MOE_PLUGIN_DISABLE", "perhaps", "MOE_PLUGIN_DISABLE: .*allowed 1 or 0"),
    ],
)
def test_bad_variables_raise_and_name_themselves(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    """A bad value is never taken for the default."""
    variable = next(v for v in envs.VARIABLES if v.name == name)
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=message):
        variable.read()
