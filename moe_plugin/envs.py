"""Every environment variable of the plugin: name, default, parser, one line of documentation."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .errors import ConfigError, explain

T = TypeVar("T")

_SWITCH_WORDS = {"auto": "auto", "on": "on", "off": "off", "true": "on", "false": "off"}


class _ArgumentError(ConfigError, argparse.ArgumentTypeError):
    """A bad value: argparse prints it as a usage error, library callers catch ConfigError."""


def parse_switch(text: str) -> Any:
    """``auto``, ``on`` or ``off``; YAML's ``true`` / ``false`` mean on / off."""
    try:
        return _SWITCH_WORDS[text.strip().lower()]
    except KeyError:
        raise _ArgumentError(
            explain(
                "use_batched_dp_moe",
                got=repr(text),
                allowed="auto, on or off",
                fix="--use-batched-dp-moe auto",
            )
        ) from None


def parse_max_tokens(text: str) -> int:
    """A positive number of tokens per rank. The upper limit is the backend's, checked later."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value <= 0:
        raise _ArgumentError(
            explain(
                "tokens per rank",
                got=repr(text),
                allowed="an integer >= 1",
                fix="--batched-dp-moe-max-tokens 256",
            )
        )
    return value


def parse_bool(text: str) -> bool:
    """``1``/``true``/``on``/``yes`` or ``0``/``false``/``off``/``no``.

    Raises:
        ValueError: anything else; what is allowed.
    """
    word = text.strip().lower()
    if word in ("1", "true", "on", "yes"):
        return True
    if word in ("0", "false", "off", "no", ""):
        return False
    raise ValueError("1 or 0")


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(", ".join(allowed))
        return text

    return parse


@dataclass(frozen=True, slots=True)
class Variable(Generic[T]):
    """One environment variable, read when asked (never at import).

    Attributes:
        name: the variable.
        default: its value when unset.
        parse: text -> value; raises ConfigError, or ValueError with what is allowed.
        doc: one line of documentation.
    """

    name: str
    default: T
    parse: Callable[[str], T]
    doc: str

    def is_set(self) -> bool:
        """Whether the user gave it (set and not empty)."""
        return bool(os.environ.get(self.name))

    def read(self) -> T:
        """The parsed value; a bad one raises :class:`ConfigError` naming the variable."""
        text = os.environ.get(self.name)
        if not text:
            return self.default
        try:
            return self.parse(text)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None
        except ValueError as error:
            raise ConfigError(
                explain(self.name, got=repr(text), allowed=str(error), fix=f"unset {self.name}")
            ) from None


DISABLE = Variable(
    "MOE_PLUGIN_DISABLE",
    False,
    parse_bool,
    "1: parse the plugin's flags and do nothing else (kill switch).",
)
USE_BATCHED_DP_MOE: Variable[Any] = Variable(
    "MOE_PLUGIN_USE_BATCHED_DP_MOE",
    "auto",
    parse_switch,
    "auto, on or off, for sglang.Engine; the flag --use-batched-dp-moe wins.",
)
MAX_TOKENS: Variable[int | None] = Variable(
    "MOE_PLUGIN_MAX_TOKENS",
    None,
    parse_max_tokens,
    "Tokens per rank, for sglang.Engine; the flag --batched-dp-moe-max-tokens wins.",
)
TRANSPORT = Variable(
    "MOE_PLUGIN_TRANSPORT",
    "auto",
    _choice("auto", "deepep", "torch"),
    "auto (DeepEP on GPUs, torch on CPU), deepep, or torch (torch.distributed; development).",
)
MIXED_CHUNKS = Variable(
    "MOE_PLUGIN_MIXED_CHUNKS",
    True,
    parse_bool,
    "0: do not let decode rows ride along with prefill chunks (SGLang's --enable-mixed-chunk) "
    "unless that is typed.",
)
VARIABLES: tuple[Variable[Any], ...] = (
    DISABLE,
    USE_BATCHED_DP_MOE,
    MAX_TOKENS,
    TRANSPORT,
    MIXED_CHUNKS,
)
