"""``moe-plugin doctor``: what is installed, what is active, and why not."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from typing import Any

from ...capability import backend_names, faulty_entry_points
from ...cli.main import Parser
from ...cli.tables import table_for
from ...envs import VARIABLES
from .. import host_checks, plugin
from ..scheduler_symbols import SYMBOLS
from ..status import STATUS
from . import machine_facts
from .doctor_launch import Verdict, default_target, judge
from .finding import Finding, State

NOT_ACTIVE = 2
PACKAGES = (
    "sglang-moe-plugin",
    "sglang",
    "torch",
    "triton",
    "sgl-deep-ep",
    "nvidia-nvshmem-cu13",
    "nvidia-nccl-cu13",
    "sgl-deep-gemm",
    "sglang-kernel",
    "flashinfer-python",
    "transformers",
)
_TARGET_HELP = "with --launch: the device to plan it for (default: this machine's, or h100)"


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0 when the plugin can act here, 2 when not."""
    parser = Parser(
        prog="moe-plugin doctor",
        description="Report host, device and libraries, to read or to file with an issue. Exit "
        "code: 0 the plugin can act here (and protects the launch), 2 not (the lines marked "
        "`wrong` say why), 1 bad usage.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--quick", action="store_true", help="skip host symbols that need model code to import"
    )
    parser.add_argument("--target", metavar="DEVICE", help=_TARGET_HELP)
    parser.add_argument(
        "--launch",
        nargs=argparse.REMAINDER,
        metavar="FLAGS…",
        help="the flags of `sglang serve`, behind all others: would this launch be protected?",
    )
    options = parser.parse_args(list(argv))
    findings = examine(quick=options.quick)
    verdict = None
    if options.launch is not None:
        verdict = judge(options.launch, options.target or default_target(options.launch))
        findings.append(verdict.finding())
    wrong = any(finding.state == "wrong" for finding in findings)
    if options.json:
        report: dict[str, Any] = {"ok": not wrong, "findings": [asdict(f) for f in findings]}
        if verdict is not None:
            report["launch"] = asdict(verdict)
        print(json.dumps(report))
        return NOT_ACTIVE if wrong else 0
    rows = [("area", "name", "state", "found")]
    rows += [(f.area, f.name, f.state, f.text) for f in findings]
    print(table_for(sys.stdout)(rows))
    if verdict is not None and verdict.plan is not None:
        print(f"\n{verdict.plan['text']}\n")
    print(f"verdict: {_verdict(findings, verdict)}")
    return NOT_ACTIVE if wrong else 0


def _verdict(findings: list[Finding], verdict: Verdict | None) -> str:
    here = [f for f in findings if f.state == "wrong" and f.area != "launch"]
    text = f"the plugin {'cannot' if here else 'can'} act here"
    if verdict is None:
        return text
    kept = verdict.protected and not here
    return f"{text}; this launch is {'protected' if kept else 'NOT protected'}"


def examine(*, quick: bool) -> list[Finding]:
    """Everything that the report shows, in its order."""
    findings = [*_versions(), *machine_facts.system(), *machine_facts.gpus()]
    findings += [*machine_facts.rdma(), *_symbols(quick=quick), *_status(), *_variables()]
    findings += _device()
    findings.append(Finding("capability", "backends", "info", ", ".join(backend_names())))
    return findings


def _versions() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding("version", name, "info", version(name)))
        except PackageNotFoundError:
            findings.append(Finding("version", name, "info", "not installed"))
    wrong = host_checks.check_version() if find_spec("sglang") else "sglang is not installed"
    if wrong:
        findings.append(Finding("host", "version", "wrong", wrong))
    elif note := host_checks.newer_than_tested():
        findings.append(Finding("host", "version", "info", note))
    return findings


def _symbols(*, quick: bool) -> list[Finding]:
    findings: list[Finding] = []
    if not find_spec("sglang"):
        return findings
    for symbol in SYMBOLS:
        if symbol.runtime and quick:
            findings.append(Finding("host", symbol.path, "info", "not checked (--quick)"))
            continue
        try:
            problem = host_checks.check_symbol(symbol)
        except Exception as error:  # model code may not import on this machine
            text = f"not checked: its module does not import here ({type(error).__name__})"
            findings.append(Finding("host", symbol.path, "info", text))
            continue
        state: State = "ok"
        if problem:
            state = "info" if symbol.without else "wrong"
        findings.append(Finding("host", symbol.path, state, problem or symbol.why))
    return findings


def _status() -> list[Finding]:
    found = [e.name for e in entry_points(group="sglang.srt.plugins")]
    findings = []
    listed = "moe_plugin" in found
    text = f"entry points: {', '.join(found) or 'none'}"
    findings.append(Finding("plugin", "entry point", "ok" if listed else "wrong", text))
    for why in faulty_entry_points():
        findings.append(Finding("plugin", "batched backend", "wrong", why))
    allowed = os.environ.get("SGLANG_PLUGINS", "").strip()
    if allowed and "moe_plugin" not in [name.strip() for name in allowed.split(",")]:
        text = f"SGLANG_PLUGINS={allowed} leaves moe_plugin out"
        findings.append(Finding("plugin", "SGLANG_PLUGINS", "wrong", text))
    try:
        plugin.register()
    except Exception as error:
        findings.append(Finding("plugin", "status", "wrong", f"registration failed: {error}"))
        return findings
    status = STATUS
    text = status.state + (f": {'; '.join(status.reasons)}" if status.reasons else "")
    state: State = "ok" if status.state == "active" else "wrong"
    findings.append(Finding("plugin", "status", state, text))
    findings.append(Finding("plugin", "hooks", "info", ", ".join(status.hooked) or "none"))
    return findings


def _variables() -> list[Finding]:
    findings = []
    for variable in VARIABLES:
        try:
            text = f"{variable.read()}{'' if variable.is_set() else ' (default)'}"
            findings.append(Finding("variable", variable.name, "info", text))
        except Exception as error:
            findings.append(Finding("variable", variable.name, "wrong", str(error)))
    return findings


def _device() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("device", "torch", "wrong", str(error))]
    if not torch.cuda.is_available():
        text = "no CUDA device: the torch transport with --device cpu only"
        return [Finding("device", "cuda", "info", text)]
    properties = torch.cuda.get_device_properties(0)
    text = (
        f"{torch.cuda.device_count()} x {properties.name}, compute capability "
        f"{properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
    )
    return [Finding("device", "cuda", "ok", text), _deep_ep()]


def _deep_ep() -> Finding:
    """Whether DeepEP imports, asked of a process of its own: its checks have side effects."""
    from ...envs import TRANSPORT

    if TRANSPORT.read() == "torch":
        return Finding("transport", "torch", "ok", f"asked for by {TRANSPORT.name}")
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import torch, deep_ep"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode == 0:
        return Finding("transport", "deepep", "ok", "deep_ep imports")
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    text = f"deep_ep does not import: {last}. Fix: reinstall sgl-deep-ep, or {TRANSPORT.name}=torch"
    return Finding("transport", "deepep", "wrong", text)
