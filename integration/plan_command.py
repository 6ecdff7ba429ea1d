"""``moe-plugin plan``: the budgets of a launch, parsed and resolved by the host's own code."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..cli.main import USAGE, Parser
from ..errors import ConfigError, MoePluginError
from ..plan import Plan, Rejection
from . import target as targets

REFUSED = 2
RESOLVED = (
    "chunked_prefill_size",
    "max_running_requests",
    "max_prefill_tokens",
    "mem_fraction_static",
    "moe_a2a_backend",
    "deepep_mode",
    "moe_runner_backend",
    "ep_size",
    "attention_backend",
    "speculative_num_draft_tokens",
)
_EPILOG = """\
Every other flag is one of `sglang serve`, parsed by SGLang itself; --model-path is a directory
with config.json at least. Exit code: 0 ok, 2 refused, 1 bad usage.

example:
  moe-plugin plan --model-path ./DeepSeek-V3 --tp-size 8 --attn-dp-size 8 --use-batched-dp-moe on
"""


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = Parser(
        prog="moe-plugin plan",
        description="Show the budgets of a launch. Needs no GPU and no weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    devices = [*sorted(targets.TARGETS), targets.LOCAL]
    parser.add_argument(
        "--target",
        default=targets.DEFAULT_TARGET,
        choices=devices,
        metavar="DEVICE",
        help=f"resolve for this device: {', '.join(devices)} (default: %(default)s; "
        f"{targets.LOCAL} is this machine's)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="moe-plugin-sweep.svg",
        metavar="FILE.svg",
        help="how tokens per rank trade prefill steps against bytes: a table, and a plot in FILE",
    )
    options, rest = parser.parse_known_args(argv)
    with _quiet(options.json) as out:
        try:
            if options.sweep is not None:
                from .sweep import sweep

                return sweep(rest, options.target, options.sweep, options.json, out)
            answer = plan_launch(rest, options.target)
        except ConfigError as error:
            print(f"moe-plugin plan: error: {error}", file=sys.stderr)
            return USAGE
        except SystemExit as exit_:  # the host's parser; its own 2 would read as "refused"
            return 0 if exit_.code in (0, None) else USAGE
        print(json.dumps(answer, default=str) if options.json else render(answer), file=out)
    return REFUSED if answer["verdict"] == "refused" else 0


def plan_launch(argv: Sequence[str], target: str) -> dict[str, Any]:
    """Parse, resolve and report one command line. The process is the target's from then on."""
    return resolve(prepare(argv, target))


def prepare(argv: Sequence[str], target: str) -> Any:
    """The host's parsed record, with our flags on it, in a process that answers for ``target``.

    Raises:
        SystemExit: the host's parser refused the command line.
        ConfigError: the plugin is not active here, or a value of ours is wrong.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    _require_active()
    from sglang.srt.server_args import prepare_server_args

    record = prepare_server_args(list(argv))
    if target != targets.LOCAL and not targets.is_simulated():
        targets.simulate(targets.get_target(target), record.model_path)
    return record


def _require_active() -> None:
    from . import plugin

    plugin.register()  # the host may have been told to load other plugins only
    if plugin.STATUS.state != "active":
        raise ConfigError(
            f"the plugin is {plugin.STATUS.state}: {'; '.join(plugin.STATUS.reasons)}. "
            "Fix: moe-plugin doctor"
        )


def resolve(record: Any) -> dict[str, Any]:
    """Resolve a record with the host's code; refusals become part of the answer."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    from . import resolution

    try:
        record.resolve_once()
    except MoePluginError as error:
        return report(error.plan or _unplanned(record), error.rejections, None)
    except Exception as error:  # the host's own refusals have no common class
        rejection = Rejection("host", f"{type(error).__name__}", "", str(error) or "see SGLang")
        return report(_unplanned(record), (rejection,), None)
    view = resolved_view(record)
    resolved = {name: getattr(view, name, None) for name in RESOLVED}
    config = view.cuda_graph_config
    for phase in ("decode", "prefill"):
        found = getattr(config, phase)
        on = found.backend != "disabled"
        resolved[f"cuda_graph_max_bs_{phase}"] = found.max_bs if on else None
        resolved[f"cuda_graph_bs_{phase}"] = found.bs if on else None
    return report(resolution.plan_of(record) or _unplanned(record), (), resolved)


def _unplanned(record: Any) -> Plan:
    """The answer for a launch that has no plan: what the capability says, if it can be asked."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    from ..capability import Capability
    from . import flags, resolution

    if flags.requested(record).switch == "off":
        return Plan(capability=Capability(False, "--use-batched-dp-moe off"))
    cfg = resolving_view(record)
    try:
        return Plan(
            capability=resolution.capability_for(record, cfg, cfg.moe_a2a_backend, cfg.deepep_mode)
        )
    except Exception as error:  # no readable model config: the host has said so already
        return Plan(capability=Capability(False, f"not known: {error}"))


def report(
    plan: Plan, rejections: Sequence[Rejection], resolved: dict[str, Any] | None
) -> dict[str, Any]:
    """The JSON object: plan, errors, and what the host resolved. 0 means "not bounded" there."""
    from dataclasses import replace

    if rejections:
        plan = replace(plan, errors=tuple(rejections))
    answer = plan.as_dict()
    for name in (
        "chunked_prefill_size",
        "max_running_requests",
        "cuda_graph_max_bs_decode",
        "cuda_graph_max_bs_prefill",
    ):
        answer[name] = answer[name] or None
    answer["resolved"] = resolved
    answer["text"] = plan.render()
    return answer


def render(answer: dict[str, Any]) -> str:
    """The answer for people."""
    lines = [answer["text"]]
    if answer["resolved"]:
        shown = {k: v for k, v in answer["resolved"].items() if not k.startswith("cuda_graph_bs_")}
        lines.insert(0, "resolved by SGLang: " + ", ".join(f"{k}={v}" for k, v in shown.items()))
    return "\n".join(lines)


@contextlib.contextmanager
def _quiet(json_only: bool) -> Iterator[Any]:
    """Standard output for the answer alone: what else is printed goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    out = os.fdopen(kept, "w", encoding="utf-8")
    try:
        if json_only:
            os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr if json_only else sys.stdout):
            yield out
    finally:
        out.flush()
        sys.stdout.flush()
        os.dup2(kept, 1)
        out.close()
