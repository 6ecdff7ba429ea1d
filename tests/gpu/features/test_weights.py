"""Weights that come and go: updates from disk and from tensors, the memory saver.

Our experts read the layer's tensors as they are, and graphs were captured over their addresses.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ...support.server_checks import answers_alone
from ...support.serving.server import Server
from .answers import ask, check_greedy, prompts
from .machine import (
    LONG,
    ON_CPU,
    OURS,
    QWEN3,
    QWEN3_OTHER,
    RANKS,
    checkpoint,
    device_gib,
    largest_rows,
    on_two_gpus,
    ready,
    sharing,
    start,
    turn,
)
from .records import See

FEATURE = "weight updates"
pytestmark = on_two_gpus

SAVES = not ON_CPU and importlib.util.find_spec("torch_memory_saver") is not None
CHANGES = sharing(QWEN3, *OURS, *(("--enable-memory-saver",) if SAVES else ()))
OTHER = sharing(QWEN3_OTHER, *OURS)
EXPERTS_OUT = re.compile(r"model\.layers\.[01]\.mlp\.experts\.\d+\.down_proj\.weight")


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[Server, Server]]:
    """One that changes its weights, and one that has the other weights from the start."""
    with start(CHANGES) as server, start(OTHER) as other:
        ready(server, other)
        yield server, other


def load(server: Server, model: str) -> None:
    """Other weights of the same shape, from disk."""
    done = server.post("/update_weights_from_disk", {"model_path": str(checkpoint(model))})
    assert done["success"], done


def checksums(server: Server) -> Any:
    """Of every rank's weights, as the host computes them."""
    return server.post("/weights_checker", {"action": "checksum"})


def test_updates_from_disk(servers: tuple[Server, Server], seen: See) -> None:
    """The other weights answer as a server that had them all along; the first ones as before."""
    server, other = servers
    texts = prompts(12, LONG)
    with turn():
        first = answers_alone(server)
        load(server, QWEN3_OTHER)
        changed = ask(server, texts, 24)
        text = check_greedy(other, ask(other, texts, 24), changed)
        assert answers_alone(server) != first
        load(server, QWEN3)
        again = answers_alone(server)
        rows = largest_rows(server)
    assert again == first, "the first weights, loaded again, answer otherwise"
    seen(f"from disk, there and back: same bits; with the other weights {text}", rows=rows)


def test_updates_from_tensors(servers: tuple[Server, Server], seen: See) -> None:
    """Two layers' experts are silenced, and given back."""
    server, _ = servers
    tensors = _experts_out(checkpoint(QWEN3))
    with turn():
        first, sums = answers_alone(server), checksums(server)
        _send(server, [(name, torch.zeros_like(tensor)) for name, tensor in tensors])
        silent = answers_alone(server)
        _send(server, tensors)
        again, same = answers_alone(server), checksums(server)
    assert silent != first, "the experts' weights do not matter"
    assert again == first
    assert same == sums
    seen(
        f"{len(tensors)} tensors of two layers' experts from another process, to zero and back: "
        "same bits and checksums as before"
    )


@pytest.mark.skipif(not SAVES, reason="requires the torch_memory_saver package and GPUs")
def test_memory_saver(servers: tuple[Server, Server], seen: See) -> None:
    """Weights, KV cache and graphs leave the device and come back; DeepEP's buffer stays."""
    server, _ = servers
    with turn():
        first = answers_alone(server)
        server.post("/flush_cache?timeout=10", {})
        before = _used_gib(server)
        server.post("/release_memory_occupation", {})
        released = _used_gib(server)
        server.post("/resume_memory_occupation", {})
        resumed = _used_gib(server)
        load(server, QWEN3)
        again = answers_alone(server)
    assert again == first
    assert released < before - 1
    seen(
        f"memory saver: {before - released:.1f} GiB given back, {resumed - released:.1f} taken "
        "again; then same bits as before"
    )


def _experts_out(model: Path) -> list[tuple[str, torch.Tensor]]:
    device = "cpu" if ON_CPU else "cuda"
    found = []
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt", device=device) as file:
            names = list(file.keys())
            found += [(name, file.get_tensor(name)) for name in names if EXPERTS_OUT.match(name)]
    assert found
    return found


def _send(server: Server, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Each rank opens the sender's memory, so that it must stay until the answer."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    if ON_CPU:
        torch.multiprocessing.set_sharing_strategy("file_system")
    else:
        monkey_patch_torch_reductions()  # names a GPU by what it is, not by its number here
    parts = [MultiprocessingSerializer.serialize(tensors, output_str=True) for _ in range(RANKS)]
    for path, body in (
        ("/begin_weight_update", {}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": parts}),
        ("/end_weight_update", {}),
    ):
        done = server.post(path, body)
        assert done["success"], (path, done)


def _used_gib(server: Server) -> float:
    """Of all ranks; or of a GPU, where nobody tells it by process."""
    used = device_gib(server)
    if used is None:
        free, total = torch.cuda.mem_get_info(0)
        used = (total - free) / 2**30
    return used
