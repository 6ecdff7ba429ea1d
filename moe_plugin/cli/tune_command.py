"""``moe-plugin tune``: measure kernel launches on this GPU and store the best.

Resumable: cells that the table already holds are skipped, and it is saved after every cell.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UnsupportedError, explain
from .main import Parser

REFUSED = 2


def main(argv: Sequence[str]) -> int:
    """Entry point of the command; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        _tune(options)
    except UnsupportedError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="moe-plugin tune", description=__doc__, allow_abbrev=False)
    parser.add_argument("--experts", type=int, required=True, help="local experts of one rank")
    parser.add_argument("--hidden", type=int, required=True, help="hidden size")
    parser.add_argument("--inter", type=int, required=True, help="one expert's intermediate size")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of the all-to-all group")
    parser.add_argument("--max-tokens", type=int, default=256, help="T, tokens per rank")
    parser.add_argument("--dtype", choices=("bf16", "fp8"), default="bf16", help="of the weights")
    parser.add_argument("--rows", type=int, nargs="+", help="rows per expert (default: powers)")
    parser.add_argument("--out", type=Path, help="table (default: the installed package's own)")
    return parser


def _tune(options: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    if not torch.cuda.is_available():
        raise UnsupportedError(
            explain(
                "device", got="no GPU", allowed="an NVIDIA GPU", fix="run it where the server runs"
            )
        )
    from ..kernels.formats import BF16, FP8_BLOCK
    from ..kernels.launch import Shape, table_path
    from ..kernels.tuning.tune import ROW_COUNTS, tune

    capacity = options.ranks * options.max_tokens
    weights = FP8_BLOCK if options.dtype == "fp8" else BF16
    shape = Shape(options.experts, capacity, options.hidden, options.inter, weights)
    path = options.out or table_path(torch.cuda.get_device_name())
    with tqdm(unit="cell") as bar:

        def progress(done: int, total: int, label: str) -> None:
            bar.total, bar.n = total, done
            bar.set_description(label)

        tune([shape], path, options.rows or ROW_COUNTS, progress)
    print(f"wrote {path}")
