"""Mixed steps in the real server on CPU: a group that decodes joins the step of one that prefills.

There are no CUDA graphs on a CPU, so a stand-in says that there are; what then votes, converts the
decoding requests and serves them is the host's, through our layers and transport.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ..support.serving.fixture_plugin import write_plugin
from ..support.serving.prompts import NEW_TOKENS, SHORT_PROMPTS
from ..support.serving.server import COMMON_ARGS, TWO_EP_RANKS, Server

FEW, MANY = 8, 300  # tokens of an answer, at most
OTHERS = range(2, len(SHORT_PROMPTS))
ROUNDS, AT_ONCE = 12, 3

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

STAND_IN = """
import os, sys

class Graphs:
    enable_lora, max_context_size, max_seq_len = False, None, None
    _backend_vote_prefill_cuda_graph = None

    def can_replay_locally(self, **batch):
        return not batch["return_logprob"]

def register():
    if "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang.srt.managers.scheduler_components import dp_attn
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from moe_plugin.integration.serve import mixed_steps

    def with_graphs(original, batch, **others):
        runner = others["model_runner"]
        kept, runner.prefill_cuda_graph_runner = runner.prefill_cuda_graph_runner, Graphs()
        try:
            return original(batch, **others)
        finally:
            runner.prefill_cuda_graph_runner = kept

    def counted(original, batch):
        with open(os.path.join(os.environ["CONVERTED"], str(os.getpid())), "a") as file:
            file.write("converted\\n")
        return original(batch)

    # As with the backend whose contexts are bounded; these are far below.
    mixed_steps.prefill_attention = lambda host: "triton"
    dp_attn.PrefillCudaGraphRunner = Graphs
    dp_attn.check_cuda_graph_backend = lambda phase, backend: backend == Backend.BREAKABLE
    around = HookType.AROUND
    managers = "sglang.srt.managers."
    HookRegistry.register(
        managers + "scheduler_components.dp_attn.prepare_mlp_sync_batch_raw", with_graphs, around
    )
    HookRegistry.register(
        managers + "schedule_batch.ScheduleBatch.convert_decode_to_extend", counted, around
    )
"""


def test_converted_requests_get_the_same_tokens(
    model: Path, stock: list[dict], tmp_path: Path
) -> None:
    converted = tmp_path / "converted"
    converted.mkdir()
    env = write_plugin(tmp_path / "graphs", "graphs", STAND_IN, {"sglang.srt.plugins": "register"})
    env |= {"CONVERTED": str(converted)}
    args = (*COMMON_ARGS, *TWO_EP_RANKS, "--use-batched-dp-moe", "on")
    with Server(args, model, ranks=2, env=env) as server:
        server.wait_ready()

        def tokens(index: int, count: int) -> list[int]:
            body = {
                "text": SHORT_PROMPTS[index],
                "sampling_params": {"temperature": 0, "max_new_tokens": count, "ignore_eos": True},
                "routed_dp_rank": index % 2,
            }
            # Log-probabilities would keep a request from being converted.
            return server.post("/generate", body)["output_ids"][:NEW_TOKENS]

        # Lengths that differ: a group that has just prefilled is then asked to join the other's.
        arriving = [(index, 1 + (index + i) % FEW) for i in range(ROUNDS) for index in OTHERS]
        with ThreadPoolExecutor(2) as pool, ThreadPoolExecutor(AT_ONCE) as more:
            # One on each rank, decoding for as long as the others arrive and end.
            many = [pool.submit(tokens, index, MANY) for index in range(2)]
            few = list(more.map(lambda asked: tokens(*asked), arriving))
            answers = [request.result() for request in many]
    expected = [answer["tokens"] for answer in stock[: len(SHORT_PROMPTS)]]
    assert answers == expected[:2]
    assert few == [expected[index][:count] for index, count in arriving]
    steps = [len(path.read_text().splitlines()) for path in converted.iterdir()]
    assert len(steps) == 2
    assert min(steps) >= ROUNDS, f"steps joined by each rank: {steps}"
