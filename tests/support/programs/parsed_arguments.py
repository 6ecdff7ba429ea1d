"""Parse a command line in a process with plugins; given: the command line."""

from program_io import given
from sglang.srt.plugins import load_plugins

load_plugins()
from sglang.srt.server_args import prepare_server_args  # noqa: E402 - hooked by now

prepare_server_args(given())
