"""Stage `soak`: random load on our servers that are up, for so many steps or so long."""

from __future__ import annotations

import json

from common import Bench
from servers import load_state
from variants import OURS

from tests.support.random_load import RandomLoad

LONGEST, NEW_TOKENS = 7900, 256  # within the models' 8,192
CLIENTS = 8  # for each group


def stage_soak(bench: Bench) -> None:
    """`--steps` of every rank, or `--seconds`; prompts of 1 to 7,900 tokens (on a CPU 1,000)."""
    options = bench.options
    outcomes = bench.report.setdefault("soak", {})
    bench.report["failed"] = []
    for server in load_state(options.work):
        name = server.record.variant
        if name[0] not in OURS:
            continue
        longest, clients = (1000, 4) if bench.cpu else (LONGEST, CLIENTS)
        load = RandomLoad(server, options.gpus, longest, NEW_TOKENS, clients * options.gpus)
        found = load.run(options.seconds, options.steps)
        logged = server.prefills()
        found |= {"prefill_batches": len(logged), "prefill_eager": logged.count(False)}
        outcomes[name] = found
        bench.report["failed"] += [f"{name}: {problem}" for problem in found["problems"]]
        print(name, json.dumps(found, indent=1), flush=True)
        bench.save()
