"""Resolve many command lines in one fresh process: reads cases on stdin, answers on stdout.

Importing the host costs seconds and its hooks cannot be undone, so tests hand over all of their
cases at once. ``stock`` cases are resolved before the plugin's hooks are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import pickle
import sys
import traceback
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any

import msgspec

FIELDS = (
    "chunked_prefill_size",
    "max_running_requests",
    "mem_fraction_static",
    "moe_a2a_backend",
    "deepep_mode",
    "ep_size",
    "moe_dense_tp_size",
    "enable_dp_lm_head",
    "enable_mixed_chunk",
    "cuda_graph_max_bs_decode",
    "cuda_graph_max_bs_prefill",
    "speculative_num_draft_tokens",
)


_parser: argparse.ArgumentParser | None = None


def _parse(case: dict[str, Any]) -> Any:
    """The host's record of one command line; its parser, once ours is in it, is made only once."""
    global _parser
    argv = case["argv"]
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    if not _installed or "--config" in argv or case.get("log"):  # it also sets up logging
        return prepare_server_args(argv)
    if _parser is None:
        _parser = argparse.ArgumentParser(prog="sglang serve")
        ServerArgs.add_cli_args(_parser)
    parsed = _parser.parse_args(argv)
    parsed._radix_eviction_policy_explicitly_set = False
    return ServerArgs.from_cli_args(parsed)


def resolve(case: dict[str, Any]) -> dict[str, Any]:
    """Parse and resolve one command line with the host's own code."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    from moe_plugin.integration.flags import requested
    from moe_plugin.integration.resolve import hooks, installation

    saved, checks = dict(os.environ), installation._checks_machine
    os.environ.update(case.get("env", {}))
    answer: dict[str, Any] = {"id": case.get("id")}
    log = io.StringIO()
    if "without" in case:  # an installation that lacks a module
        installation._checks_machine = True
        hooks.runtime_problems = (
            lambda backend: []
        )  # model code of a GPU does not import without one
        installation.find_spec = lambda name: None if name == case["without"] else find_spec(name)
    try:
        with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
            server_args = _parse(case)
            server_args.resolve_once()
        server_args = pickle.loads(pickle.dumps(server_args))
        view = resolved_view(server_args)
        config = view.cuda_graph_config
        plan = hooks.plan_of(server_args)
        answer.update(
            ok=True,
            resolved={name: getattr(view, name, None) for name in FIELDS},
            decode={"backend": config.decode.backend, "bs": config.decode.bs},
            prefill={"backend": config.prefill.backend, "bs": config.prefill.bs},
            plan=plan.as_dict() if plan else None,
            left_alone=requested(server_args).left_alone,
            declared=[source for source, _ in server_args._resolved_overrides],
            environment={
                name: value for name, value in os.environ.items() if saved.get(name) != value
            },
        )
        for phase in ("decode", "prefill"):
            answer[phase]["max_bs"] = getattr(config, phase).max_bs
        _ask_oracles(case, server_args, plan, answer)
    except BaseException as error:  # SystemExit of argparse too
        answer.update(ok=False, error=str(error), type=type(error).__name__)
        errors = getattr(error, "rejections", ())
        answer["errors"] = [
            {
                "limit": e.limit,
                "got": e.got,
                "fix": e.fix,
                "changes": [list(c) for c in e.changes],
                "alternatives": [[list(c) for c in way] for way in e.alternatives],
            }
            for e in errors
        ]
        if isinstance(error, SystemExit):
            answer["error"] = log.getvalue()
    finally:
        installation.find_spec, installation._checks_machine = find_spec, checks
        answer["log"] = log.getvalue()[-4000:] if case.get("log") else ""
        if not case.get("keep"):
            hooks.withdraw_variables()
            os.environ.clear()
            os.environ.update(_PRISTINE)
    return answer


def _ask_oracles(case: dict[str, Any], server_args: Any, plan: Any, answer: dict[str, Any]) -> None:
    """What the host's own code makes of the resolved launch; its modules load model code."""
    try:
        if "requests" in case and (plan is not None or case.get("all_rows")):
            from oracle import rows_of

            answer["rows"] = rows_of(server_args, case["requests"])
        if case.get("built"):
            from built_model import built
            from oracle import runs_of

            answer["built"] = built(server_args)
            answer["runs"] = runs_of(server_args)
        if case.get("built_draft"):
            from built_model import built_draft

            answer["draft"] = built_draft(server_args)
        if case.get("layout"):
            from oracle import capability_of, layout_of

            answer["layout"] = layout_of(server_args)
            answer["capability"] = capability_of(server_args)
    except Exception as error:
        answer["oracle"] = "".join(traceback.format_exception(error))


_installed = False
_PRISTINE = dict(os.environ)


def install() -> None:
    """The plugin's flags and resolution hooks, as its entry point would."""
    global _installed
    if _installed:
        return
    _installed = True
    from sglang.srt.server_args import ServerArgs

    from moe_plugin.integration import flags
    from moe_plugin.integration.resolve import hooks

    add, make = ServerArgs.add_cli_args, ServerArgs.from_cli_args.__func__
    ServerArgs.add_cli_args = staticmethod(lambda parser: flags.add_cli_args(add, parser))
    ServerArgs.from_cli_args = classmethod(lambda cls, args: flags.from_cli_args(make, cls, args))
    hooks.install()


def answer_batch(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stock cases first, while the host is unhooked; answers in the order of the cases."""
    answers = {index: resolve(case) for index, case in enumerate(cases) if case.get("stock")}
    if len(answers) < len(cases):
        install()
    answers |= {i: resolve(case) for i, case in enumerate(cases) if not case.get("stock")}
    return [answers[index] for index in range(len(cases))]


def main() -> None:
    """JSON lines: the set-up first, then one batch of cases per line, answered by one line."""
    warnings.simplefilter("ignore")
    msgspec.structs.fields = cache(msgspec.structs.fields)  # a third of the time otherwise
    gc.set_threshold(100_000, 100, 100)  # what the host imports is searched in vain
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the host prints must not mix with the answers
    request = json.loads(sys.stdin.readline())
    if request.get("target"):
        from moe_plugin.integration.commands.target_device import get_target, simulate

        simulate(get_target(request["target"]))  # before anything of the host is imported
    for line in sys.stdin:
        print(json.dumps(answer_batch(json.loads(line)), default=str), file=out, flush=True)


if __name__ == "__main__":
    main()
