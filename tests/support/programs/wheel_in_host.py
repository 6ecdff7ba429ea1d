"""Where an installed plugin and its kernels lie, and whether the host's parser knows it."""

from program_io import emit
from sglang.srt.plugins import load_plugins

import moe_plugin
import moe_plugin.kernels.experts_torch as kernels

load_plugins()
# Hooked by now.
from sglang.srt.server_args import prepare_server_args  # noqa: E402

from moe_plugin.integration import flags  # noqa: E402
from moe_plugin.integration.status import STATUS  # noqa: E402

args = prepare_server_args(["--model-path", "none", "--use-batched-dp-moe", "off"])
emit([moe_plugin.__file__, kernels.__file__, STATUS.state, flags.requested(args).switch])
