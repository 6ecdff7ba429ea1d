"""Resolution in a host whose model code has changed; given: the command line.

Nothing of the model code is looked at before a plan is about to be made.
"""

from program_io import emit, given
from sglang.srt.plugins import load_plugins

load_plugins()
import sglang.srt.layers.moe.ep_moe.layer as layer  # noqa: E402 - changed after it is hooked

layer.DeepEPMoE.run_moe_core = lambda self, outcome: None
from sglang.srt.arg_groups.model_override_base import resolving_view  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402

from moe_plugin.integration import flags  # noqa: E402

args = prepare_server_args(given())
args.resolve_once()
switch = flags.requested(args).switch
emit([args._moe_plugin_plan, switch, resolving_view(args).max_running_requests])
