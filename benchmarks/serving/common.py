"""What the stages share: one command's options, its report, its model, and its launches."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from loads import Point, kv_tokens, parse
from machine import environment
from report import Report
from servers import Detached, launch
from serving.checkpoint import write_checkpoint
from serving.server import COMMON_ARGS
from serving.shared_models import shared_model
from variants import Variant, on_gpu, resident, variant

BEGAN = time.monotonic()
CPU_LONGEST = 2048  # of COMMON_ARGS
HERE = Path(__file__).parent


class Bench:
    """One command: its options, and the report that it writes as it grows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cpu: bool = options.model == "tiny"
        self.stamp = datetime.datetime.now().strftime("%H%M%S")
        self.report: Report = {
            "environment": environment(),
            "model": options.model,
            "gpus": options.gpus,
            "commands": [" ".join(sys.argv[1:])],
        }
        options.work.mkdir(parents=True, exist_ok=True)
        options.out.mkdir(parents=True, exist_ok=True)

    @property
    def points(self) -> list[Point]:
        """Where load is measured; on CPU those of its context."""
        points = parse(self.options.points)
        return [p for p in points if not self.cpu or p.load.longest <= CPU_LONGEST]

    def left_s(self) -> float:
        """Of this command's time."""
        return float(self.options.budget) - (time.monotonic() - BEGAN)

    def save(self) -> None:
        """Write the report; called after every step, since commands may be cut short."""
        path = self.options.out / f"serving-{self.options.stage}-{self.stamp}.json"
        path.write_text(json.dumps(self.report, indent=1))

    def model(self) -> Path:
        """The checkpoint, written unless it is there."""
        began = time.monotonic()
        if self.cpu:
            folder = self.options.work / "tiny"
            return folder if folder.exists() else write_checkpoint(folder)
        folder = shared_model(self.options.model)
        self.report["model_written_s"] = round(time.monotonic() - began, 1)
        return folder

    def shared_args(self, launched: Variant) -> tuple[str, ...]:
        """Of a server that shares the GPUs with others."""
        if self.cpu:
            return COMMON_ARGS
        tokens = self.options.kv_tokens or kv_tokens(self.points, launched.dp_groups)
        return (*on_gpu(self.options.attention_backend), *resident(tokens))

    def alone_args(self) -> tuple[str, ...]:
        """Of a server that has the GPUs for itself."""
        return COMMON_ARGS if self.cpu else on_gpu(self.options.attention_backend)

    def variant(self, name: str) -> Variant:
        """A variant by name, on this command's GPUs."""
        return variant(name, cpu=self.cpu, gpus=self.options.gpus)

    def launch(self, launched: Variant, model: Path, args: Sequence[str]) -> Detached:
        """Start a server as the options say."""
        options = self.options
        return launch(
            launched,
            model,
            options.work,
            (*args, *options.more),
            cold=options.cold,
            cpu_ranks=options.gpus if self.cpu else 0,
        )
