"""Given a model: what becomes of launches, ``auto`` and ``on``, when our planning has a bug."""

from __future__ import annotations

from program_io import emit, given
from sglang.srt.plugins import load_plugins

from moe_plugin.integration.attached_plan import plan_of
from moe_plugin.integration.flags import requested
from moe_plugin.integration.resolve import hooks

load_plugins()
# Hooked by now.
from sglang.srt.server_args import prepare_server_args  # noqa: E402


def mistaken(*args: object, **options: object) -> object:
    """In place of planning."""
    raise ZeroDivisionError("a bug")


def resolve(*flags: str) -> str:
    """Why the launch is left alone, or the class of what it raised."""
    args = prepare_server_args(["--model-path", given(), "--device", "cpu", *flags])
    try:
        args.resolve_once()
    except Exception as error:
        return type(error).__name__
    assert plan_of(args) is None
    return requested(args).left_alone


hooks.plan_for = mistaken
emit([resolve(), resolve("--use-batched-dp-moe", "on")])
