"""What of the host is hooked in a scheduler process."""

import sglang.srt.managers.scheduler  # noqa: F401 - a process that runs model code
from program_io import emit
from sglang.srt.plugins import load_plugins

from moe_plugin.integration.status import STATUS

load_plugins()
emit(STATUS.hooked)
