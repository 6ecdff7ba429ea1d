"""Servers that tests start on GPUs, as values: `tests/host/test_gpu_launches.py` reads them too.

Each is resolved there for an H100 and an H200, on a machine without either, so that a flag that
does not go with another one is found before anybody waits for a server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..support.serving.server import LAUNCH_SERVER, Server

LAYERS = 4
MODEL = f"qwen3-bf16-{LAYERS}"
"""Of what most of them serve: some of Qwen3-30B-A3B's layers with random weights."""
DISABLED = {"MOE_PLUGIN_DISABLE": "1"}
# No FlashInfer in the slim stack of a GPU host without a network.
BACKENDS = ("--attention-backend", "triton", "--sampling-backend", "pytorch")


@dataclass(frozen=True, slots=True)
class Launch:
    """How one server is started, beside its checkpoint's folder, host and port.

    Attributes:
        model: the name of its checkpoint.
        flags: of the command line.
        env: variables beside the caller's.
        planned: fields of the plan that its test is about, with the values they must have.
        refused: part of the refusal where there is to be one.
    """

    model: str
    flags: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    planned: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""

    @property
    def stock(self) -> bool:
        """Whether the host is as it would be without the plugin."""
        return DISABLED.items() <= self.env.items()


def serve(launch: Launch, model: Path, env: Mapping[str, str] | None = None) -> Server:
    """Start it; ``env`` holds what is only known now."""
    whole = {**launch.env, **(env or {})}
    return Server(launch.flags, model, ranks=0, env=whole, command=LAUNCH_SERVER)
