"""The frozen result of planning: what is filled, what binds, what is refused and how to fix it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..batched_backend import Capability, Mode
from ..errors import BudgetError, ConfigError, UnsupportedError, explain
from .memory_record import Memory

Source = Literal["user", "default", "derived", "host"]
Kind = Literal["budget", "config", "unsupported"]
Change = tuple[str, "str | None"]
"""(flag or variable, its new value; None removes it)."""
_ERRORS: dict[str, type[ConfigError] | type[UnsupportedError]] = {
    "budget": BudgetError,
    "config": ConfigError,
    "unsupported": UnsupportedError,
}

T_NAME = "max_dispatch_tokens_per_rank"
"""The budget that all others follow from."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """One thing that cannot work, and what makes it work.

    Attributes:
        limit: what binds ("tokens per rank", "hidden sizes", "host").
        got: the user's value, with the arithmetic.
        allowed: what the limit admits.
        fix: what to type instead.
        changes: the same fix for programs.
        kind: which error it is raised as.
        host_runs: the stock host runs this launch, or may: nothing to refuse it for unless the
            plugin was asked for by name.
        alternatives: what else, in place of ``changes``, makes it work; part of ``fix``.
    """

    limit: str
    got: str
    allowed: str
    fix: str
    changes: tuple[Change, ...] = ()
    kind: Kind = "budget"
    host_runs: bool = False
    alternatives: tuple[tuple[Change, ...], ...] = ()

    def __str__(self) -> str:
        return explain(self.limit, got=self.got, allowed=self.allowed, fix=self.fix)


def words_of(changes: Iterable[Change]) -> str:
    """Changes as one would type them."""
    words = (f"unset {name}" if value is None else typed(name, value) for name, value in changes)
    return " ".join(words)


def typed(flag: str, value: str) -> str:
    """A flag with its value, for a shell; several values are several words."""
    return f"{flag} {shlex.quote(value) if value.startswith('{') else value}".strip()


@dataclass(frozen=True, slots=True)
class Budget:
    """One planned value and why it is what it is.

    Attributes:
        name: the host's name for it.
        value: as one would type it; None when this instance does not use it.
        source: who chose it.
        limit: the limit that binds.
        headroom: units left below that limit, or None when it is not counted in units.
        arithmetic: the numbers behind it.
        flag: the flag or variable that sets it.
    """

    name: str
    value: int | None
    source: Source
    limit: str
    headroom: int | None
    arithmetic: str
    flag: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every budget of one launch. Picklable: it rides on the host's arguments to its children.

    Attributes:
        capability: the answer that this plan stands on.
        max_dispatch_tokens_per_rank: T, rows that one rank may dispatch in one forward.
        token_multiple: what T must be a multiple of, by the transport and by graph capture.
        chunked_prefill_size: tokens over all DP groups, as typed; 0 when prefill is not bounded.
        cuda_graph_max_bs_prefill: tokens per DP group; 0 without bounded prefill graphs.
        cuda_graph_max_bs_decode: requests per DP group; 0 without bounded decode graphs.
        max_running_requests: requests over all DP groups; 0 when decode is not bounded.
        nvshmem_qp_depth: queue-pair depth of the buffer; 0 without one.
        rdma_buffer_bytes: DeepEP's own size hint, bytes per rank; 0 without an RDMA buffer.
        rdma_device_bytes: device memory that the buffer takes, bytes per rank.
        workspace_bytes: experts' working memory, bytes per rank.
        reserved_bytes: what resolution kept back for both in the host's memory sizing, bytes per
            rank; 0 when the user set ``--mem-fraction-static``.
        memory: every byte of a rank, as planned; None where the device's memory is not known.
        prompt_steps: (tokens of a prompt, prefill forwards that it takes alone); empty where
            prefill is not bounded.
        budgets: the same, value by value, with sources and arithmetic.
        errors: why it is refused.
        notes: things to know that refuse nothing.
        runner: whose experts run: ``moe_plugin`` or ``host``.
        own_decode: with the host's runner, ours compute low-latency rows nevertheless: mode auto.
        transport: the backend's name, or ``torch`` in DeepEP's place.
        ep_size: expert-parallel ranks.
        num_experts: physical experts, redundant ones included.
        hidden_size: row width, elements.
        top_k: experts per token.
        attn_tp_size: ranks that one DP group's rows are scattered over.
        dtype: activation dtype by torch name.
        fp8_rows: the model's experts take rows in FP8; a draft's may not.
        groups_apart: nothing of the model but the all-to-all joins the DP groups, so that each
            replays its own graph: ``--moe-dense-tp-size 1 --enable-dp-lm-head``, typed or filled.
        mixed_chunk: decode rows ride along with prefill chunks: ``--enable-mixed-chunk``, typed or
            filled.
    """

    capability: Capability
    max_dispatch_tokens_per_rank: int = 0
    token_multiple: int = 1
    chunked_prefill_size: int = 0
    cuda_graph_max_bs_prefill: int = 0
    cuda_graph_max_bs_decode: int = 0
    max_running_requests: int = 0
    nvshmem_qp_depth: int = 0
    rdma_buffer_bytes: int = 0
    rdma_device_bytes: int = 0
    workspace_bytes: int = 0
    reserved_bytes: int = 0
    memory: Memory | None = None
    prompt_steps: tuple[tuple[int, int], ...] = ()
    budgets: tuple[Budget, ...] = ()
    errors: tuple[Rejection, ...] = ()
    notes: tuple[str, ...] = field(default=())
    runner: Literal["moe_plugin", "host"] = "moe_plugin"
    own_decode: bool = False
    transport: str = "deepep"
    ep_size: int = 1
    num_experts: int = 0
    hidden_size: int = 0
    top_k: int = 0
    attn_tp_size: int = 1
    dtype: str = "bfloat16"
    fp8_rows: bool = False
    groups_apart: bool = False
    mixed_chunk: bool = False

    @property
    def experts(self) -> str:
        """Whose experts run, for people."""
        return "host (prefill) and moe_plugin (decode)" if self.own_decode else self.runner

    @property
    def verdict(self) -> Literal["ok", "refused"]:
        """``refused`` iff there are errors."""
        return "refused" if self.errors else "ok"

    @property
    def bounds_prefill(self) -> bool:
        """Whether prefill rows go through the bounded buffer."""
        return Mode.EXTEND in self.capability.modes

    @property
    def bounds_decode(self) -> bool:
        """Whether decode, verify and draft rows go through the bounded buffer."""
        return Mode.DECODE in self.capability.modes

    @property
    def all_low_latency(self) -> bool:
        """Whether every dispatch of this instance is DeepEP's low latency, which asks the ranks for
        the same calls in the same order and nothing more."""
        return self.capability.backend == "deepep" and self.bounds_prefill

    @property
    def prefills_beside_decode(self) -> bool:
        """Whether one DP group may prefill while another replays its decode graph: not on an
        instance that only decodes."""
        return self.groups_apart and bool(self.prompt_steps)

    def runs_eagerly(self, attn_dp_size: int) -> bool:
        """Whether forwards may fit no graph: prefills, and batches past the largest for decode."""
        captured = self.cuda_graph_max_bs_decode * attn_dp_size
        return self.bounds_prefill or self.max_running_requests > captured

    @property
    def captures_moe_in_prefills(self) -> bool:
        """Whether MoE layers are part of the host's prefill graphs, where it captures any: ours
        can be, in low latency. What is reserved and what is captured both stand on this."""
        return self.runner == "moe_plugin" and self.bounds_prefill

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        raw = asdict(self)
        raw["capability"] = {
            "use_batched_dp_moe": self.capability.ok,
            "reason": self.capability.reason,
            "modes": sorted(mode.value for mode in self.capability.modes),
            "backend": self.capability.backend,
        }
        for error in raw["errors"]:
            error["changes"] = [list(change) for change in error["changes"]]
        raw["prompt_steps"] = {str(tokens): steps for tokens, steps in self.prompt_steps}
        raw["verdict"] = self.verdict
        return raw


def refusal(
    errors: Iterable[Rejection], plan: Plan | None = None
) -> ConfigError | UnsupportedError:
    """One exception that names every rejection; it carries them, and the refused plan."""
    errors = tuple(errors)
    kinds = {error.kind for error in errors}
    raised = _ERRORS[kinds.pop()] if len(kinds) == 1 else ConfigError
    head = "this launch cannot run batched data-parallel MoE"
    lines = [str(error) for error in errors]
    if len(lines) == 1:
        text = f"{head}: {lines[0]}"
    else:
        listed = "\n".join(f"  {number}. {line}" for number, line in enumerate(lines, 1))
        text = f"{head}, for {len(lines)} reasons:\n{listed}"
    exception = raised(text)
    exception.rejections = errors
    exception.plan = plan
    return exception
