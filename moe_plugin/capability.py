"""``use_batched_dp_moe``: the one predicate behind the budgets and the runtime layout.

A *batched* all-to-all backend hands the experts ``[local_experts, ranks * T, hidden]`` with a
live count per expert, from a buffer sized once for at most ``T`` tokens per rank. Whether an
instance runs that way is asked here, once, from arguments and model config alone; budgets and
runtime layout both read the same :class:`Capability`, so they cannot disagree.

Stdlib only: importing this must not import torch or sglang.
"""

from __future__ import annotations

import logging
from importlib.metadata import EntryPoint, entry_points

from .backends import BUILT_IN
from .backends.not_batched import NOT_BATCHED
from .batched_backend import BatchedBackend, Capability, CapabilityFacts
from .errors import ConfigError, explain
from .registry import Registry

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "moe_plugin.backends"

_BACKENDS: Registry[BatchedBackend] = Registry("batched-DP MoE backend")
for _name, _backend in BUILT_IN.items():
    _BACKENDS.register(_name, _backend)
_discovered = False
_faulty: list[str] = []


def register_backend(backend: BatchedBackend) -> BatchedBackend:
    """Register a backend globally, under ``backend.name``; returns it.

    To put one in the place of a built-in, :func:`unregister_backend` that one first.

    Raises:
        ConfigError: the name is taken by another backend, built-in ones included.
    """
    return _BACKENDS.register(backend.name, backend)


def unregister_backend(name: str) -> BatchedBackend:
    """Remove a backend (tests, embedders); unknown names raise :class:`ConfigError`."""
    return _BACKENDS.unregister(name)


def get_backend(name: str) -> BatchedBackend:
    """The backend called ``name``; unknown names raise, listing what exists."""
    _discover()
    return _BACKENDS.get(name)


def backend_names() -> list[str]:
    """Names of all registered backends, built-in and third-party."""
    _discover()
    return _BACKENDS.names()


def use_batched_dp_moe(facts: CapabilityFacts) -> Capability:
    """Whether this instance runs batched data-parallel MoE, why, and in which modes.

    True iff the model or its draft has a routed MoE layer, the resolved all-to-all backend is
    registered, and at least one forward mode of this instance resolves to the batched layout.
    It asks for neither DP > 1 nor EP > 1: one rank alone already dies at T + 1 tokens.
    """
    _discover()
    draft_backend = facts.draft_a2a_backend or facts.a2a_backend
    users = []
    if facts.has_routed_moe:
        users.append(("the model", facts.a2a_backend))
    if facts.draft_has_routed_moe:
        users.append(("the draft model", draft_backend))
    if not users:
        return Capability(False, "neither the model nor its draft has a routed MoE layer")
    for who, name in users:
        if name in _BACKENDS:
            return _answer(facts, who, _BACKENDS.get(name))
    names = sorted({name for _, name in users})
    why = "; ".join(f"{name}: {NOT_BATCHED[name]}" for name in names if name in NOT_BATCHED)
    return Capability(
        False,
        f"all-to-all backend {', '.join(names)} is not batched{f' ({why})' if why else ''}, "
        f"registered are {_BACKENDS.names()}",
    )


def _answer(facts: CapabilityFacts, who: str, backend: BatchedBackend) -> Capability:
    modes = backend.batched_modes(facts) & facts.instance_modes()
    if not modes:
        return Capability(
            False,
            f"{backend.name} runs no forward mode of this instance in its batched layout "
            f"(deepep_mode={facts.deepep_mode}, disaggregation_mode={facts.disaggregation_mode})",
            backend=backend.name,
        )
    listed = " and ".join(sorted(mode.value for mode in modes))
    return Capability(
        True, f"{who} has routed MoE layers and {backend.name} batches {listed}", modes,
        backend.name,
    )  # fmt: skip


def faulty_entry_points() -> tuple[str, ...]:
    """Why third-party backends that are installed are not registered, a sentence each."""
    _discover()
    return tuple(_faulty)


def _discover() -> None:
    """Load third-party backends once, from the ``moe_plugin.backends`` entry points.

    An entry point is a :class:`BatchedBackend` or a callable without arguments returning one. One
    that fails is left out and logged: launches that have nothing to do with it go on.
    """
    global _discovered
    if _discovered:
        return
    _discovered = True
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            register_backend(_loaded(entry))
        except Exception as error:
            _faulty.append(f"{type(error).__name__}: {error}")
            logger.warning("a batched backend is not registered: %s", _faulty[-1])


def _loaded(entry: EntryPoint) -> BatchedBackend:
    loaded = entry.load()
    backend = loaded() if not isinstance(loaded, BatchedBackend) else loaded
    if not isinstance(backend, BatchedBackend):
        raise ConfigError(
            explain(
                f"entry point {entry.name!r} of group {ENTRY_POINT_GROUP!r}",
                got=f"{type(backend).__name__} from {entry.value}",
                allowed="a BatchedBackend, or a callable returning one",
                fix="correct or uninstall that distribution",
            )
        )
    if backend.name in BUILT_IN:
        raise ConfigError(
            explain(
                f"batched backend {backend.name!r} of entry point {entry.value}",
                got="the name of a built-in backend",
                allowed=f"a name not in {list(BUILT_IN)}",
                fix="rename it or uninstall that distribution; code that means to replace a "
                "built-in calls unregister_backend and register_backend",
            )
        )
    return backend
