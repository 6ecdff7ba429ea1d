"""What a command line is resolved to, and with which plan; given: the command line."""

import os

from program_io import emit, given
from sglang.srt.plugins import load_plugins

load_plugins()
# Hooked by now.
from sglang.srt.arg_groups.model_override_base import resolving_view  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402

args = prepare_server_args(given())
args.resolve_once()
view = resolving_view(args)
plan = getattr(args, "_moe_plugin_plan", None)
ports = ("port", "nccl_port")
emit(
    {
        "a2a": view.moe_a2a_backend,
        "mode": view.deepep_mode,
        "chunk": view.chunked_prefill_size,
        "running": view.max_running_requests,
        "plan": plan.as_dict() if plan else None,
        "capacity": os.environ.get("SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"),
        "all": repr(sorted((k, v) for k, v in args.resolved_dict().items() if k not in ports)),
    }
)
