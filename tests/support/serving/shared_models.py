"""Models of the serving benchmark, written once on this machine for whoever asks."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOM = 24 * 2**30  # for a model in memory, and as much again
WRITER = Path(__file__).parents[3] / "benchmarks" / "serving" / "models.py"


def shared_model(name: str) -> Path:
    """The folder of a model by the name that ``benchmarks/serving/models.py`` knows it by.

    A process of its own writes it, whose GPU memory goes with it; others that ask wait for it. It
    stays for the next run.
    """
    memory, temporary = (
        Path(folder) / f"moe-plugin-{name}" for folder in ("/dev/shm", tempfile.gettempdir())
    )
    lock = Path(tempfile.gettempdir()) / f"moe-plugin-{name}.lock"
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for folder in (memory, temporary):
            if (folder / "written").exists():
                return folder
        roomy = memory.parent.is_dir() and shutil.disk_usage(memory.parent).free > ROOM
        folder = memory if roomy else temporary
        paths = [str(WRITER.parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
        subprocess.run(
            [sys.executable, "-P", str(WRITER), name, str(folder), "cuda"],
            env={**os.environ, "PYTHONPATH": ":".join(filter(None, paths))},
            check=True,
        )
        return folder
