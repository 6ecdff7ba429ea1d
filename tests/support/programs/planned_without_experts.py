"""How a scheduler ends that the launcher planned for, and that cannot load the plugin.

Given: the command line.
"""

from program_io import emit, given
from sglang.srt.plugins import load_plugins

load_plugins()
from sglang.srt.server_args import prepare_server_args  # noqa: E402 - hooked by now

args = prepare_server_args(given())
args.resolve_once()
# The process of the scheduler begins here.
import sglang.srt.managers.scheduler as scheduler  # noqa: E402
from sglang.srt.plugins.hook_registry import HookRegistry  # noqa: E402

from moe_plugin.integration import host_checks, plugin  # noqa: E402
from moe_plugin.integration.status import STATUS  # noqa: E402

STATUS.state = "not loaded"
host_checks.check_version = lambda: "sglang 9.9.9 is outside the supported range"
plugin.register()
HookRegistry.apply_hooks()
try:
    scheduler.Scheduler(args, None)
except Exception as error:
    emit([type(error).__name__, str(error)])
