"""What registering does in a host that has changed; given: the change, and our switch."""

import sglang.srt.arg_groups.overrides as overrides
import sglang.srt.server_args  # noqa: F401 - loaded before it changes, like in the host
from program_io import emit, given
from sglang.srt.plugins.hook_registry import HookRegistry

from moe_plugin.integration import host_checks, plugin
from moe_plugin.integration.status import STATUS

change, switch = given()
if change == "renamed":
    overrides.declare = overrides.declare_resolution
    del overrides.declare_resolution
elif change == "re-signed":
    overrides.declare_resolution = lambda record, **fields: None
elif change == "version":
    host_checks.host_version = lambda: "0.4.9"
else:
    raise ValueError(change)
plugin.register()
plugin.register()  # idempotent
HookRegistry.apply_hooks()
# Hooked by now, if anything is.
from sglang.srt.arg_groups import resolution_hooks  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402

prepare_server_args(["--model-path", "none", "--use-batched-dp-moe", switch])
emit([STATUS.state, STATUS.reasons, len(resolution_hooks._HOOKS)])
