"""`MOE_PLUGIN_REPLAY_MIXED_STEPS`: how a decoding group votes while another one prefills.

The vote is the host's own function; graphs need a GPU, so the runner that holds them is a stand-in.
"""

from __future__ import annotations

import pytest

from ..support.hosts import HOOKED, host_result

VARIABLE = "MOE_PLUGIN_REPLAY_MIXED_STEPS"

VOTES = """
import os
import torch
from types import SimpleNamespace
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.moe.utils import MoeA2ABackend
from sglang.srt.managers.scheduler_components import dp_attn
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner import PrefillCudaGraphRunner
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from moe_plugin.batched_backend import Capability, Mode
from moe_plugin.integration.serve import buffer, mixed_steps
from moe_plugin.planning.plan import Plan

def deepep():
    return MoeA2ABackend.DEEPEP

dp_attn.get_moe_a2a_backend = deepep
dp_attn.uses_ssm_state = lambda config: False
dp_attn.get_cp_strategy = lambda: None
dp_attn.get_memory = lambda: SimpleNamespace(enable_hisparse=False)
overlap = SimpleNamespace(enable_two_batch_overlap=False)
dp_attn.get_exec = lambda: SimpleNamespace(overlap=overlap)
runner = object.__new__(PrefillCudaGraphRunner)
runner.enable_lora = False
runner.max_context_size = runner.max_seq_len = None
runner._backend_vote_prefill_cuda_graph = None
runner.can_replay_locally = lambda **found: found["num_tokens"] == 40

GROUPED, LATENT = (ModelConfig(os.environ[name]) for name in ("GROUPED", "LATENT"))

def vote(mode=ForwardMode.DECODE, bounds_prefill=True, ours="moe_plugin", same_bits=False,
         contexts=(200,) * 40, attention="triton", model=GROUPED, **batch):
    modes = frozenset(Mode) if bounds_prefill else frozenset({Mode.DECODE})
    plan = Plan(capability=Capability(True, "", modes), runner=ours)
    buffer.current_plan = lambda: plan
    buffer.host_config = lambda: SimpleNamespace(
        enable_deterministic_inference=same_bits, attention_backend=attention)
    found = dict(forward_mode=mode, return_logprob=False, has_grammar=False, reqs=[],
                 multimodal_inputs=None, batch_size=lambda: 40, input_embeds=None,
                 seq_lens_cpu=torch.tensor(contexts),
                 replace_embeds=None, prefix_lens=None)
    return mixed_steps.around_prefill_graph_vote(
        dp_attn._local_prefill_cuda_graph_vote, local_batch=SimpleNamespace(**found | batch),
        num_tokens=40, prefill_graph_runner=runner, coordinated_prefill=True,
        breakable_prefill=True, spec_algorithm=SpeculativeAlgorithm.NONE, model_config=model)

found = {
    "decode": vote(),
    "with a grammar": vote(has_grammar=True),
    "normal mode for prefill": vote(bounds_prefill=False),
    "the host's experts": vote(ours="host"),
    "more rows than a graph": vote(batch_size=lambda: 300),
    "deterministic inference": vote(same_bits=True),
    "a long context": vote(contexts=[8193] + [1] * 39),
    "much context": vote(contexts=[1300] * 40),
    "much context of others": vote(contexts=[1200] * 40 + [9000]),
    "a long context, split": vote(contexts=[100000] + [1] * 39, attention="fa3"),
    "some latent context": vote(contexts=[70] * 40, model=LATENT),
    "much latent context": vote(contexts=[80] * 40, model=LATENT),
    "prefill": vote(mode=ForwardMode.EXTEND),
}
found["the host's question afterwards"] = dp_attn.get_moe_a2a_backend is deepep
emit(found)
"""


@pytest.mark.parametrize(("env", "hooks"), [({}, True), ({VARIABLE: "0"}, False)])
def test_the_vote_is_hooked_unless_switched_off(env: dict[str, str], hooks: bool) -> None:
    hooked = [name.rpartition(".")[2] for name in host_result(HOOKED, env=env)]
    assert ("_local_prefill_cuda_graph_vote" in hooked) == hooks


def test_a_decoding_group_may_join_prefill_graphs(models: dict[str, str]) -> None:
    env = {"GROUPED": models["qwen3"], "LATENT": models["deepseek-v3"]}
    assert host_result(VOTES, env=env) == {
        "decode": True,
        "with a grammar": False,
        "normal mode for prefill": False,
        "the host's experts": False,
        "more rows than a graph": False,
        "deterministic inference": False,
        "a long context": False,
        "much context": False,
        "much context of others": True,
        "a long context, split": True,
        "some latent context": True,
        "much latent context": False,
        "prefill": True,
        "the host's question afterwards": True,
    }
