"""`make demo`: the real SGLang server on CPU, two EP ranks, through the plugin.

Writes a small random MoE checkpoint, serves it on the stock host (one rank, no all-to-all) and
through the plugin, and checks that nothing differs. Exits non-zero if anything does.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from .checkpoint import Shape, write_checkpoint
from .compare import MAX_LOGPROB_DISTANCE, different_tokens, logprob_distance, uncounted_layers
from .prompts import NEW_TOKENS, PROMPTS
from .server import COMMON_ARGS, TWO_EP_RANKS, Server, ServerDied

EP_RANKS = 2


class Progress:
    """A dot per line of the server's log, so that the wait is not silent."""

    def __init__(self, title: str) -> None:
        self.started = time.monotonic()
        print(f"{title} ", end="", flush=True)

    def __call__(self, _line: str) -> None:
        print(".", end="", flush=True)

    def done(self) -> None:
        """End the line with the seconds it took."""
        print(f" {time.monotonic() - self.started:.0f} s")


def serve(title: str, args: tuple[str, ...], model: Path, ranks: int, **env: str) -> Server:
    """Start a server and show progress until it is ready."""
    progress = Progress(title)
    server = Server((*COMMON_ARGS, *args), model, ranks=ranks, env=env, progress=progress)
    try:
        server.wait_ready()
    except BaseException:
        print()
        server.stop()
        raise
    progress.done()
    return server.quiet()


def main() -> int:
    """Run the demo; the exit code says whether everything was equal."""
    shape = Shape()
    prompts = list(PROMPTS)
    with tempfile.TemporaryDirectory(prefix="moe-plugin-demo-") as folder:
        model = write_checkpoint(Path(folder) / "qwen3-moe-random", shape)
        print(
            f"checkpoint: Qwen3-MoE layout, {shape.num_hidden_layers} layers, "
            f"{shape.num_experts} experts, top-{shape.num_experts_per_tok}, random weights"
        )
        with serve(
            "stock host, 1 rank, no all-to-all", (), model, 1, SGLANG_PLUGINS="moe_plugin_cpu"
        ) as stock:
            reference = stock.generate_many(prompts, NEW_TOKENS)
        with serve(
            f"through the plugin, {EP_RANKS} EP ranks",
            (*TWO_EP_RANKS, "--use-batched-dp-moe", "on"),
            model,
            EP_RANKS,
        ) as server:
            answers = server.generate_many(prompts, NEW_TOKENS)
            states = server.states()
            tail = server.tail()
    failures = report(prompts, reference, answers, states, shape)
    if failures:
        print("\nFAILED:\n- " + "\n- ".join(failures) + "\n\nthe server's last lines:\n" + tail)
        return 1
    print("\nOK: same tokens, same logprobs, every MoE layer forward went through the plugin.")
    return 0


def report(
    prompts: list[str], reference: list[dict], answers: list[dict], states: list[dict], shape: Shape
) -> list[str]:
    """Print what happened; return what should not have."""
    failures: list[str] = []
    if len(states) != EP_RANKS:
        return [f"the plugin is active in {len(states)} of {EP_RANKS} schedulers"]
    plan = states[0]["plan"]
    print("\nthe plan:")
    for budget in plan["budgets"]:
        print(
            f"  {budget['name']:<32} {budget['value']:>8}  {budget['source']:<8} {budget['limit']}"
        )
    print("\nMoE layer forwards through the plugin's runner, by rank and layer:")
    for state in states:
        counts = ", ".join(f"{k}: {v}" for k, v in state["layer_forwards"].items())
        print(
            f"  rank {state['tp_rank']}: {counts}; the host counted {state['model_forwards']} "
            f"forwards x {shape.num_hidden_layers} layers; largest dispatch {state['max_rows']}"
        )
    failures += uncounted_layers(states, shape.num_hidden_layers)
    budget = plan["max_dispatch_tokens_per_rank"]
    for state in states:
        failures += [
            f"rank {state['tp_rank']} dispatched {rows} rows in {mode}, more than {budget}"
            for mode, rows in state["max_rows"].items()
            if rows > budget
        ]
    print(
        f"\n{len(prompts)} prompts, the longest {max(map(len, prompts))} tokens (budget {budget}):"
    )
    for index in different_tokens(answers, reference):
        failures.append(
            f"prompt {index}: tokens {answers[index]['tokens']}, stock {reference[index]['tokens']}"
        )
    if not failures:
        distance = logprob_distance(answers, reference)
        print(f"  tokens equal; logprobs differ by at most {distance:.1e}")
        if distance > MAX_LOGPROB_DISTANCE:
            failures.append(f"logprobs differ by {distance:.1e} > {MAX_LOGPROB_DISTANCE:.0e}")
    return failures


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServerDied as error:
        print(f"\nFAILED: the server did not start\n{error}")
        sys.exit(1)
