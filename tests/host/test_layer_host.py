"""What our hooks in the host's model code decide, with the host's own functions around them."""

from __future__ import annotations

from ..support.hosts import HOOKED, host_result

METADATA = """
from sglang.srt.layers import dp_attention
from moe_plugin.batched_backend import Capability
from moe_plugin.integration.serve import buffer
from moe_plugin.planning.plan import Plan

def sizes(tokens, **plan):
    dp_attention.get_dp_global_num_tokens = lambda: tokens
    buffer.current_plan = lambda: Plan(capability=Capability(True, ""), **plan)
    metadata = buffer.current_metadata()
    return metadata and metadata.sp_local_sizes

emit([
    sizes([5, 2], ep_size=4, attn_tp_size=2),
    sizes([5], ep_size=4, attn_tp_size=2),
    sizes([7], ep_size=4, attn_tp_size=4),
    sizes(None, ep_size=4, attn_tp_size=4),
])
"""


def test_ranks_that_the_host_does_not_tell_are_taken_to_hold_as_many() -> None:
    """With --moe-dense-tp-size 1 and --enable-dp-lm-head a rank knows its own group only."""
    assert host_result(METADATA) == [[3, 3, 1, 1], [3, 3, 3, 3], [2, 2, 2, 2], None]


ROWS = """
import torch
from types import SimpleNamespace
from moe_plugin.integration.serve import buffer, moe_layer as layer

class Layer:
    layer_id = 3
    deprecate_flag = False
    quant_config = object()  # of the checkpoint, which may leave this layer out

    def __init__(self, dtype):
        self.w13_weight = torch.empty(1, dtype=dtype)
        self.asked = None
        self.dispatcher = self

    def set_quant_config(self, config):
        self.asked = config["dispatcher_output_dtype"]

def asked(dtype, flag="auto"):
    made = Layer(dtype)
    buffer.host_config = lambda: SimpleNamespace(deepep_dispatcher_output_dtype=flag)
    try:
        layer._attach_runner(lambda *args: None, made, None, (), {})
    except Exception as error:
        return str(error)
    return made.asked

layer._make_runner = lambda made, plan: None
emit([asked(torch.float8_e4m3fn), asked(torch.bfloat16), asked(torch.bfloat16, "fp8")])
"""


def test_rows_are_dispatched_in_the_dtype_of_the_layers_weights() -> None:
    """Layers that an FP8 checkpoint leaves in bf16 get bf16 rows, or say which flag forbids it."""
    fp8, bf16, forced = host_result(ROWS)
    assert (fp8, bf16) == (None, "bf16")
    assert "MoE layer 3" in forced
    assert "remove --deepep-dispatcher-output-dtype" in forced


LIMITED = """
from types import SimpleNamespace
from moe_plugin.integration.serve import moe_layer as layer

def refusal(**limits):
    moe = SimpleNamespace(activation="silu", is_gated=True, apply_router_weight_on_input=False,
                          **limits)
    made = SimpleNamespace(layer_id=3, moe_runner_config=moe)
    try:
        layer._make_runner(made, None)
    except Exception as error:
        return f"{type(error).__name__} {error}"

emit([refusal(swiglu_limit=10.0), refusal(gemm1_alpha=1.7, gemm1_clamp_limit=7.0),
      refusal(swiglu_limit=None, gemm1_clamp_limit=0)])
"""


def test_a_limited_activation_never_reaches_our_experts() -> None:
    """Whatever the model's config calls it: the layer knows."""
    first, second, unlimited = host_result(LIMITED)
    assert first.startswith("UnsupportedError MoE layer 3: activation")
    assert "silu with swiglu_limit" in first
    assert "gemm1_alpha, gemm1_clamp_limit" in second
    assert unlimited.startswith("AttributeError")  # it went on, to what this layer lacks


INVARIANT = """
from types import SimpleNamespace
from moe_plugin.integration.serve import buffer, moe_layer as layer

moe = SimpleNamespace(activation="silu", is_gated=True, apply_router_weight_on_input=False)
made = SimpleNamespace(layer_id=3, moe_runner_config=moe, num_experts=16, moe_ep_size=2, top_k=2,
                       hidden_size=64, intermediate_size_per_partition=32)

def batch_invariant(asked):
    buffer.host_config = lambda: SimpleNamespace(
        device="cpu", enable_deterministic_inference=asked)
    plan = SimpleNamespace(max_dispatch_tokens_per_rank=128)
    return layer._make_runner(made, plan).config.batch_invariant

emit([batch_invariant(False), batch_invariant(True)])
"""


def test_deterministic_inference_asks_for_the_same_bits_in_any_batch() -> None:
    """``--enable-deterministic-inference``."""
    assert host_result(INVARIANT) == [False, True]


SAVER = """
from contextlib import contextmanager
from types import SimpleNamespace
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter
from moe_plugin.batched_backend import Capability
from moe_plugin.integration.serve import buffer
from moe_plugin.planning.plan import Plan

log = []

class Adapter:
    @contextmanager
    def disable(self):
        log.append("off")
        yield
        log.append("on")

def create(enable):
    log.append(enable)
    return Adapter()

TorchMemorySaverAdapter.create = staticmethod(create)
buffer.host_config = lambda: SimpleNamespace(enable_memory_saver=True)
buffer.check_ranks_agree = lambda group, sizes: None
buffer._create_low_latency = lambda *args: log.append("made")
plan = Plan(capability=Capability(True, ""))

def mode(normal):
    return SimpleNamespace(enable_normal=lambda: normal)

for normal in (False, True):
    buffer._create(lambda *args: log.append("made"), None, plan,
                   (None, 2048, 2, mode(normal)), 8)
emit(log)
"""


def test_the_buffer_is_outside_the_memory_savers_region() -> None:
    """The model is built inside it; what is remapped with the weights loses DeepEP's counters."""
    once = [True, "off", "made", "on"]
    assert host_result(SAVER) == [*once, *once]


ORDER = """
from types import SimpleNamespace
from moe_plugin.batched_backend import Capability
from moe_plugin.integration.serve import buffer
from moe_plugin.planning.plan import Plan

log = []

def dispatcher(name):
    low_latency = SimpleNamespace(
        hidden_size=2048, num_experts=8, _get_buffer=lambda: log.append(f"{name} creates"))
    return SimpleNamespace(_low_latency_dispatcher=low_latency)

def serve(transport):
    log.clear()
    buffer.current_plan = lambda: Plan(
        capability=Capability(True, ""), max_dispatch_tokens_per_rank=256, transport=transport)
    buffer._cpu_group = lambda: "cpu"
    buffer.check_ranks_agree = lambda group, sizes: log.append([group, sizes["tokens per rank"]])
    buffer.announce(dispatcher("first"))
    buffer.announce(SimpleNamespace(_inners=[dispatcher("second"), dispatcher("third")]))
    log.append("pools")
    assert buffer.after_memory_pools("result", None) == "result"
    buffer.after_memory_pools(None, None)
    return list(log)

emit([serve("deepep"), serve("torch")])
"""


def test_the_buffer_is_created_once_the_kv_cache_is_there() -> None:
    """As on the stock host: it comes out of what the host kept back. The ranks are compared before
    their weights load; a transport without device memory waits for nothing."""
    deepep, torch = host_result(ORDER)
    assert deepep == [["cpu", 256], "pools", "first creates"]
    assert torch == ["first creates", "second creates", "third creates", "pools"]


def test_the_buffer_waits_for_the_hosts_pools() -> None:
    """The hook is in, and its place in the host is what it was: pools before graphs."""
    assert "sglang.srt.managers.scheduler.Scheduler.init_memory_pools" in host_result(HOOKED)
    order = host_result(
        "import inspect\n"
        "from sglang.srt.managers.scheduler import Scheduler\n"
        "emit(inspect.getsource(Scheduler.init_model_worker))"
    )
    steps = ("init_tp_model_worker()", "init_memory_pools()", "init_all_cuda_graphs()")
    assert [order.index(step) for step in steps] == sorted(order.index(step) for step in steps)
