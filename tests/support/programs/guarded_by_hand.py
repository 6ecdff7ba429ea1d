"""What the guard says of arguments resolved without us; given: the command line."""

from program_io import emit, given
from sglang.srt.server_args import prepare_server_args

from moe_plugin.integration.serve import start_guard

args = prepare_server_args(given())
args.resolve_once()
try:
    emit(start_guard.before_scheduler_init(None, args))
except Exception as error:
    emit(type(error).__name__)
