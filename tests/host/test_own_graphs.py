"""Which graph each attention-DP group may replay, by the host's own votes and its own comparison.

The exchange between the ranks is replaced by what each of them sends; graphs need a GPU, so the
runner that holds them is a stand-in.
"""

from __future__ import annotations

import pytest

from ..support.hosts import HOOKED, host_result

VOTES = """
from types import SimpleNamespace
import torch
from sglang.srt.layers.moe.utils import MoeA2ABackend
from sglang.srt.managers.scheduler_components import dp_attn
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner import PrefillCudaGraphRunner
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from sglang.srt import runtime_context
from sglang.srt.utils import common
from moe_plugin.batched_backend import Capability, Mode
from moe_plugin.errors import BudgetError
from moe_plugin.integration.serve import own_graphs, process
from moe_plugin.planning.plan import Plan

T, LARGEST = 64, 40
dp_attn.get_moe_a2a_backend = lambda: MoeA2ABackend.DEEPEP
runner = object.__new__(PrefillCudaGraphRunner)
runner.enable_lora = False
runner.max_context_size = runner.max_seq_len = None
runner._backend_vote_prefill_cuda_graph = None
runner.can_replay_locally = lambda **found: found["num_tokens"] <= LARGEST

def batch(kind, tokens):
    mode = ForwardMode.EXTEND if kind == "prefill" else ForwardMode.DECODE
    return SimpleNamespace(
        forward_mode=mode, input_embeds=None, replace_embeds=None, prefix_lens=None,
        return_logprob=False, has_grammar=False, reqs=[], multimodal_inputs=None,
        seq_lens_cpu=None, batch_size=lambda: tokens)

def info(ranks, kind, tokens):
    local = None if kind == "idle" else batch(kind, tokens)
    return dp_attn.MLPSyncBatchInfo(
        num_dp_ranks=ranks, tp_size=1, cp_size=1, num_tokens=tokens,
        num_tokens_for_logprob=tokens, is_extend_in_batch=kind == "prefill",
        can_run_decode_cuda_graph=dp_attn._local_decode_cuda_graph_vote(
            local_batch=local, disable_cuda_graph=False),
        can_run_draft_cuda_graph=True, local_can_run_tbo=False,
        local_forward_mode=(local.forward_mode if local else ForwardMode.IDLE).value,
        can_run_prefill_cuda_graph=dp_attn._local_prefill_cuda_graph_vote(
            local_batch=local, num_tokens=tokens, prefill_graph_runner=runner,
            coordinated_prefill=True, breakable_prefill=True,
            spec_algorithm=SpeculativeAlgorithm.NONE, model_config=None))

def step(*groups, joined=False, low_latency=True, speculation=None, draft=None, cp=1,
         gathered=False):
    plan = Plan(capability=Capability(True, "", frozenset(Mode) if low_latency
                                      else frozenset({Mode.DECODE}), "deepep"),
                max_dispatch_tokens_per_rank=T)
    process.current_plan = lambda: plan
    process.host_config = lambda: SimpleNamespace(
        moe_a2a_backend="deepep", speculative_algorithm=speculation,
        speculative_moe_a2a_backend=draft, attn_cp_size=cp)
    common.require_mlp_tp_gather = lambda: joined
    flags = SimpleNamespace(dp=SimpleNamespace(prefill_graph_has_dp_gather=gathered))
    runtime_context.get_flags = lambda: flags
    active = SimpleNamespace(active_ranks_cpu=torch.ones(len(groups)))
    dp_attn.get_parallel = lambda: SimpleNamespace(tp_group=active)
    own_graphs.groups_are_apart.cache_clear()
    own_graphs._speculates.cache_clear()
    sent = [info(len(groups), *group) for group in groups]
    rows = torch.stack([one._get_local_tensor("cpu") for one in sent])
    dp_attn.exchange_sync_rows = lambda flat, local, group: flat.copy_(rows.flatten())
    found = []
    for one in sent:
        own_graphs.around_all_gather(type(one).all_gather, one, device="cpu", group=None)
        assert one.is_extend_in_batch == any(kind == "prefill" for kind, _ in groups)
        assert one.global_num_tokens == [tokens for _, tokens in groups]
        kind = groups[len(found)][0]
        prefills = kind == "prefill"
        graph = one.can_run_prefill_cuda_graph if prefills else one.can_run_decode_cuda_graph
        found.append("graph" if graph else "eager")
    return found

def refused(*groups):
    try:
        step(*groups)
    except BudgetError as error:
        return str(error)

MIXED = (("decode", 8), ("prefill", 40), ("idle", 0), ("prefill", 41))
emit({
    "apart": step(*MIXED),
    "two": step(("decode", 8), ("prefill", 8)),
    "no prefill": step(("decode", 8), ("idle", 0)),
    "joined": step(*MIXED, joined=True),
    "normal mode": step(*MIXED, low_latency=False),
    "context parallel": step(*MIXED, cp=2),
    "gathered in a graph": step(*MIXED, gathered=True),
    "speculation": step(*MIXED[1:], speculation="EAGLE"),
    "draft elsewhere": step(*MIXED[1:], speculation="EAGLE", draft="none"),
    "too many": refused(("decode", 8), ("prefill", T + 1)),
})
"""


@pytest.fixture(scope="module")
def votes() -> dict[str, list[str]]:
    """What each group runs, by case."""
    found: dict[str, list[str]] = host_result(VOTES)
    return found


def test_the_comparison_is_hooked() -> None:
    hooked = [name.rpartition("dp_attn.")[2] for name in host_result(HOOKED)]
    assert "MLPSyncBatchInfo.all_gather" in hooked


def test_each_group_replays_its_own_graph(votes: dict[str, list[str]]) -> None:
    """Whatever the others do; the one whose batch is larger than any graph runs eagerly alone."""
    assert votes["apart"] == ["graph", "graph", "graph", "eager"]
    assert votes["two"] == votes["no prefill"] == ["graph", "graph"]


@pytest.mark.parametrize(
    "case", ["joined", "normal mode", "context parallel", "gathered in a graph"]
)
def test_joined_groups_stay_coupled(votes: dict[str, list[str]], case: str) -> None:
    """As on the stock host: one batch without a graph, and all groups run eagerly."""
    assert votes[case] == ["eager"] * 4


def test_speculation_keeps_decode_coupled(votes: dict[str, list[str]]) -> None:
    """Idle groups would replay a verify without a tree."""
    assert votes["speculation"] == ["graph", "eager", "eager"]
    assert votes["draft elsewhere"] == ["eager"] * 3


def test_more_than_t_rows_are_refused_on_every_rank(votes: dict[str, str]) -> None:
    """The first of them holds eight."""
    assert "65 on the busiest rank" in votes["too many"]
