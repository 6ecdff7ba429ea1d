"""What our hooks in the host's model code decide, with the host's own functions around them."""

from __future__ import annotations

from typing import Any

import pytest

from ..support.hosts import HOOKED, host_result, program


def test_ranks_that_the_host_does_not_tell_are_taken_to_hold_as_many() -> None:
    """With --moe-dense-tp-size 1 and --enable-dp-lm-head a rank knows its own group only."""
    found = host_result(program("layer_metadata"))
    assert found == [[3, 3, 1, 1], [3, 3, 3, 3], [2, 2, 2, 2], None]


def test_rows_are_dispatched_in_the_dtype_of_the_layers_weights() -> None:
    """Layers that an FP8 checkpoint leaves in bf16 get bf16 rows, or say which flag forbids it."""
    fp8, bf16, forced, *always, nixl_fp8 = host_result(program("dispatched_rows"))
    assert (fp8, bf16, nixl_fp8) == (None, "bf16", None)
    assert "MoE layer 3" in forced
    assert "remove --deepep-dispatcher-output-dtype" in forced
    for text, backend in zip(always, ("mooncake", "nixl"), strict=True):
        assert f"FP8 for every layer over {backend}" in text
        assert "Fix: --moe-a2a-backend deepep" in text


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """Runners by what is special about their layers."""
    found: dict[str, Any] = host_result(program("made_runners"))
    return found


def test_an_activation_that_ours_do_not_compute_never_reaches_them(made: dict[str, Any]) -> None:
    """Whatever the model's config calls it: the layer knows."""
    for case in ("scaled, unlimited", "two added to up"):
        assert made[case].startswith("UnsupportedError MoE layer 3: activation")
    assert "gemm1_alpha=1.7" in made["scaled, unlimited"]
    assert "gemm1_beta=2.0" in made["two added to up"]
    for case in ("limited", "clamped", "clamped and limited"):
        assert made[case]["type"] == "BatchedMoERunner"


def test_activations_are_read_as_the_host_computes_them() -> None:
    """Plain, DeepSeek-V4's, Step-3.5's and GigaChat's, gpt-oss's, MiniMax-M3's: largest error."""
    errors = host_result(program("host_activations"))
    assert set(errors) == {"plain", "limited", "clamped", "interleaved", "scaled"}
    assert max(errors.values()) < 1e-5


def test_mode_auto_decodes_on_ours_and_prefills_on_the_hosts() -> None:
    """Where the plan splits them; the layer's gate and the dtype of its rows stay as they are."""
    split, *others = host_result(program("split_experts"))
    assert split == ["the host's", "ours", "the host's", []]
    # A plan that does not split them; a draft's weights of another dtype, and packed ones.
    assert others == 3 * [["the host's", "the host's", "the host's", []]]


def test_limits_that_are_off_are_none(made: dict[str, Any]) -> None:
    """The runner is made: 16 experts on two ranks."""
    runner = made["no limits"]
    assert (runner["type"], runner["local_experts"]) == ("BatchedMoERunner", 8)


def test_deterministic_inference_asks_for_the_same_bits_in_any_batch(made: dict[str, Any]) -> None:
    """``--enable-deterministic-inference``."""
    assert made["no limits"]["batch_invariant"] is False
    assert made["deterministic"]["batch_invariant"] is True


ORDER = """
from types import SimpleNamespace
from moe_plugin.batched_backend import Capability
from moe_plugin.integration.serve import buffer, process
from moe_plugin.planning.plan import Plan

log = []

def dispatcher(name):
    low_latency = SimpleNamespace(
        hidden_size=2048, num_experts=8, _get_buffer=lambda: log.append(f"{name} creates"))
    return SimpleNamespace(_low_latency_dispatcher=low_latency)

def serve(transport, joins=False):
    log.clear()
    process.joins_serving_ranks = lambda: joins
    process.current_plan = lambda: Plan(
        capability=Capability(True, ""), max_dispatch_tokens_per_rank=256, transport=transport)
    buffer._cpu_group = lambda: "cpu"
    buffer.check_ranks_agree = lambda group, sizes: log.append([group, sizes["tokens per rank"]])
    buffer.announce(dispatcher("first"))
    buffer.announce(SimpleNamespace(_inners=[dispatcher("second"), dispatcher("third")]))
    log.append("pools")
    assert buffer.after_memory_pools("result", None) == "result"
    buffer.after_memory_pools(None, None)
    return list(log)

emit([serve("deepep"), serve("torch"), serve("deepep", joins=True)])
"""


def test_the_buffer_is_created_once_the_kv_cache_is_there() -> None:
    """As on the stock host: it comes out of what the host kept back. The ranks are compared before
    their weights load, but for one that joins others, which serve already; a transport without
    device memory waits for nothing."""
    deepep, torch, joiner = host_result(ORDER)
    assert deepep == [["cpu", 256], "pools", "first creates"]
    assert torch == ["first creates", "second creates", "third creates", "pools"]
    assert joiner == ["pools", "first creates"]


ROOM = """
from types import SimpleNamespace
from moe_plugin.batched_backend import Capability
from moe_plugin.integration.serve import buffer
from moe_plugin.planning.plan import Plan

log = []
buffer._cpu_group = lambda: "cpu"
buffer.check_room = lambda group, needed, free: log.append(["room", group])
buffer.check_ranks_agree = lambda group, sizes: log.append(["same", group])
buffer._create_low_latency = lambda *args: log.append("created")
for normal in (False, True):
    mode = SimpleNamespace(enable_normal=lambda normal=normal: normal)
    plan = Plan(capability=Capability(True, ""))
    original = lambda *args: log.append("created by the host")
    buffer._create(original, None, plan, ("devices", 2048, 2, mode), 8)
emit(log)
"""


def test_device_memory_is_looked_at_before_the_devices_talk() -> None:
    """NCCL's communicator takes some, and would fail first: in low latency and in mode auto."""
    first = [["room", "cpu"], ["same", "devices"]]
    assert host_result(ROOM) == [*first, "created", *first, "created by the host"]


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
