"""Runs of the feature tests, joined to one record."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "features.py"
GROUP = """\
#!/usr/bin/env bash
# In the place of gpu_host.sh: STACK features FILE...
echo "$1 on $CUDA_VISIBLE_DEVICES: ${*:3}"
mkdir -p "$OUT/logs" && echo log >"$OUT/logs/$$.log"
cat >"$OUT/features-$$.json" <<END
{"environment": {"device": "H100"}, "commands": ["pytest"],
 "features": [{"feature": "EPLB", "test": "$3", "outcome": "passed", "reason": ""}]}
END
[[ $3 == *hangs* ]] && { echo $$ >"$OUT/../hangs.pid"; exec sleep 300; }
exit 0
"""
"""One group's process; one that hangs has written its first outcome before."""


def _write(path: Path, device: str, *rows: tuple[str, str]) -> Path:
    features = [
        {"feature": "EPLB", "test": test, "outcome": outcome, "reason": ""}
        for test, outcome in rows
    ]
    record: dict[str, Any] = {
        "environment": {"device": device},
        "commands": [f"pytest {path.stem}"],
        "features": features,
    }
    path.write_text(json.dumps(record))
    return path


def _join(out: Path, *files: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", str(SCRIPT), *map(str, files), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_last_outcome_of_a_test_counts(tmp_path: Path) -> None:
    first = _write(tmp_path / "b.json", "H100", ("one", "failed"), ("two", "passed"))
    second = _write(tmp_path / "a.json", "H100", ("one", "passed"), ("two", "skipped"))
    done = _join(tmp_path / "out.json", first, second)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert [row["outcome"] for row in record["features"]] == ["passed", "passed"]
    assert record["commands"] == ["pytest b", "pytest a"]


def test_other_machines_make_another_record(tmp_path: Path) -> None:
    files = [_write(tmp_path / f"{device}.json", device) for device in ("H100", "H200")]
    done = _join(tmp_path / "out.json", *files)
    assert done.returncode != 0
    assert "different environments" in done.stderr


def _checkout(folder: Path, gpus: int) -> dict[str, str]:
    """A checkout with as much as the script needs; returns the variables to run it with."""
    (folder / "benchmarks").mkdir()
    (folder / "bin").mkdir()
    (folder / "tmp").mkdir()
    for name in ("features.sh", "features.py"):
        shutil.copy(BENCHMARKS / name, folder / "benchmarks" / name)
    programs = {
        "benchmarks/gpu_host.sh": GROUP,
        "bin/nvidia-smi": "#!/bin/sh\n" + "echo GPU\n" * gpus,
        "bin/python3": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OUT": str(folder / "out"), "TMPDIR": str(folder / "tmp")}


def _archived(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """(record, text of the other files) of the one file that comes back."""
    assert [path.name for path in (folder / "out").iterdir()] == ["features.tgz"]
    with tarfile.open(folder / "out" / "features.tgz") as archive:
        files = {
            member.name: archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            for member in archive.getmembers()
            if member.isfile()
        }
    return json.loads(files["./record.json"]), files


def test_groups_end_in_one_archive(tmp_path: Path) -> None:
    """One of them hangs: the limit ends it, and what it had seen is kept."""
    env = _checkout(tmp_path, gpus=4)
    command = ["benchmarks/features.sh", "STACK", "3", "eplb weights", "hangs", "client/a/b"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 20
    record, files = _archived(tmp_path)
    assert {row["test"] for row in record["features"]} == {
        f"tests/gpu/features/test_{name}.py" for name in ("eplb", "hangs", "client")
    }
    said = files["./features-eplb-weights.txt"]
    assert said.startswith("STACK on 0,1: tests/gpu/features/test_eplb.py tests/gpu/features/test")
    assert files["./features-hangs.txt"].startswith("STACK on 2,3:")
    said = files["./features-client-a-b.txt"]
    assert said == "STACK on 0,1: tests/gpu/features/test_client.py -k a or b\n"
    assert len([name for name in files if name.startswith("./logs/")]) == 3
    assert not _runs(tmp_path)


def test_a_script_that_is_stopped_keeps_what_was_seen(tmp_path: Path) -> None:
    """And ends its groups."""
    env = _checkout(tmp_path, gpus=2)
    command = ["benchmarks/features.sh", "STACK", "100", "hangs"]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    while not (tmp_path / "tmp" / "hangs.pid").exists():
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    record, _ = _archived(tmp_path)
    assert [row["outcome"] for row in record["features"]] == ["passed"]
    assert not _runs(tmp_path)


def _runs(folder: Path) -> bool:
    """Whether the group that hangs is still there."""
    return Path(f"/proc/{int((folder / 'tmp' / 'hangs.pid').read_text())}").exists()
