"""How a scheduler of arguments that were resolved before plugins load ends; given: the flags."""

import sglang.srt.managers.scheduler as scheduler
from program_io import emit, given
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

args = prepare_server_args(given())
args.resolve_once()
load_plugins()
try:
    scheduler.Scheduler(args, None)
except Exception as error:
    emit([type(error).__name__, str(error)])
