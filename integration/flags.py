"""The plugin's flags in the host's parser, and how their values reach resolution.

The host drops namespace attributes that are not ``ServerArgs`` fields, so the parsed values ride
on the record as an underscore attribute: it may be set at any time and survives pickling, which
is how it reaches child processes. ``sglang.Engine`` has no command line; the variables of
:mod:`moe_plugin.envs` stand in for the flags there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..envs import MAX_TOKENS, USE_BATCHED_DP_MOE, parse_max_tokens, parse_switch

Switch = Literal["auto", "on", "off"]

SWITCH_FLAG = "--use-batched-dp-moe"
MAX_TOKENS_FLAG = "--batched-dp-moe-max-tokens"
_ATTRIBUTE = "_moe_plugin_request"


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked of the plugin.

    Attributes:
        switch: ``auto`` (act when the resolved configuration is batched), ``on``, ``off``.
        max_tokens: explicit tokens per rank, or None.
        switch_source: the flag or variable that gave the switch, or "default".
        max_tokens_source: likewise for ``max_tokens``.
        left_alone: why the plugin leaves this launch alone; empty where it does not.
    """

    switch: Switch = "auto"
    max_tokens: int | None = None
    switch_source: str = "default"
    max_tokens_source: str = "default"
    left_alone: str = ""


def add_cli_args(original: Callable[..., Any], parser: argparse.ArgumentParser) -> Any:
    """AROUND hook on ``ServerArgs.add_cli_args``: the host's flags, then ours."""
    result = original(parser)
    group = parser.add_argument_group("batched data-parallel MoE (moe_plugin)")
    group.add_argument(
        SWITCH_FLAG,
        type=parse_switch,
        default=None,
        metavar="{auto,on,off}",
        help="Bound every batch to what the low-latency all-to-all can move, and run the experts "
        "batched. auto (default): when the resolved configuration is batched; on: also select "
        "deepep in low_latency mode; off: leave the host as it is.",
    )
    group.add_argument(
        MAX_TOKENS_FLAG,
        type=parse_max_tokens,
        default=None,
        metavar="N",
        help="Tokens per rank that one all-to-all dispatch may carry (default: 256, or what memory "
        "and explicit budgets suggest). Batch budgets that are not set explicitly follow from it.",
    )
    return result


def from_cli_args(original: Callable[..., Any], cls: type, args: argparse.Namespace) -> Any:
    """AROUND hook on ``ServerArgs.from_cli_args``: carry our values on the record."""
    server_args = original(cls, args)
    switch = getattr(args, "use_batched_dp_moe", None)
    max_tokens = getattr(args, "batched_dp_moe_max_tokens", None)
    setattr(server_args, _ATTRIBUTE, _request(switch, max_tokens))
    return server_args


def requested(server_args: Any) -> Request:
    """The request carried by ``server_args``; the environment's where none is carried."""
    carried = getattr(server_args, _ATTRIBUTE, None)
    return carried if isinstance(carried, Request) else _request(None, None)


def carry_request(server_args: Any, record: Any, changes: Mapping[str, str | None]) -> None:
    """Let the request of ``server_args`` ride on ``record``, with flags of ours changed. What came
    from a variable is read again."""
    request = requested(server_args)
    typed = {
        SWITCH_FLAG: request.switch if request.switch_source == SWITCH_FLAG else None,
        MAX_TOKENS_FLAG: request.max_tokens
        if request.max_tokens_source == MAX_TOKENS_FLAG
        else None,
    }
    switch, tokens = (changes.get(flag, value) for flag, value in typed.items())
    parsed = parse_switch(str(switch)) if switch is not None else None
    most = parse_max_tokens(str(tokens)) if tokens is not None else None
    setattr(record, _ATTRIBUTE, _request(parsed, most))


def stand_down(server_args: Any, reason: str) -> None:
    """From here on, in every process, this launch is one with ``--use-batched-dp-moe off``."""
    request = replace(requested(server_args), switch="off", left_alone=reason)
    setattr(server_args, _ATTRIBUTE, request)


def _request(switch: Switch | None, max_tokens: int | None) -> Request:
    switch_source, tokens_source = SWITCH_FLAG, MAX_TOKENS_FLAG
    if switch is None:
        switch = USE_BATCHED_DP_MOE.read()
        switch_source = USE_BATCHED_DP_MOE.name if USE_BATCHED_DP_MOE.is_set() else "default"
    if max_tokens is None:
        max_tokens, tokens_source = MAX_TOKENS.read(), MAX_TOKENS.name
        if max_tokens is None:
            tokens_source = "default"
    return Request(switch, max_tokens, switch_source, tokens_source)
