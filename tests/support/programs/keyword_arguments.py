"""T of a launch without a command line, as a child process of the host sees it; given: a model."""

import pickle

from program_io import emit, given
from sglang.srt.plugins import load_plugins

load_plugins()
from sglang.srt.server_args import ServerArgs  # noqa: E402 - hooked by now

args = ServerArgs(
    model_path=given(),
    device="cpu",
    tp_size=2,
    attn_dp_size=2,
    ep_size=2,
    enable_dp_lm_head=True,
    dtype="float32",
    attention_backend="torch_native",
)
args.resolve_once()
child = pickle.loads(pickle.dumps(args))
emit(child._moe_plugin_plan.max_dispatch_tokens_per_rank)
