"""Graphs of a launch: what the user named, and which the host captures."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...errors import MoePluginError
from ...planning.device_memory import UNSET_PREFILL_GRAPH
from ...planning.facts import GRAPH_MULTIPLE
from ...planning.integers import ceil_to
from ...planning.plan import Rejection, refusal

CONFIG = "--cuda-graph-config"
"""The host's JSON, which wins over its flags."""
BREAKABLE = "breakable"
"""The host's own choice for prefills."""
NOT_CAPTURED = {"prefill": "decode", "decode": "prefill"}
"""By the role of an instance, the phase that the host does not capture by itself
(``apply_cuda_graph_disaggregation_roles``)."""
_UNCAPTURED = ("DeepseekV4",)
"""Beginnings of the architectures whose prefills it leaves uncaptured."""


def typed_config(server_args: Any) -> dict[str, dict[str, Any]]:
    """What ``--cuda-graph-config`` says of each phase."""
    config = server_args.cuda_graph_config
    config = config.to_dict() if hasattr(config, "to_dict") else config
    phases = config.items() if isinstance(config, dict) else ()
    return {
        phase: {key: value for key, value in named.items() if value is not None}
        for phase, named in phases
        if isinstance(named, dict)
    }


def _named_graphs(server_args: Any, phase: str) -> dict[str, Any]:
    return typed_config(server_args).get(phase, {})


def _named_backend(server_args: Any, cfg: Any, phase: str) -> str | None:
    """The graphs' backend that the user named for a phase."""
    flag = getattr(cfg, f"cuda_graph_backend_{phase}", None)
    backend: str | None = _named_graphs(server_args, phase).get("backend") or flag
    return backend


class TypedSizes(NamedTuple):
    """One place in which the user named the sizes of a phase's graphs.

    Attributes:
        flag: ``--cuda-graph-config``, or the phase's own ``--cuda-graph-bs-*`` or ``-max-bs-*``.
        key: ``bs``, a list, or ``max_bs``, the largest.
        value: as it was typed.
    """

    flag: str
    key: str
    value: Any


def typed_sizes(server_args: Any, phase: str) -> list[TypedSizes]:
    """Where the user named sizes for a phase; the first wins (``parse_cuda_graph_config``)."""
    named, places = _named_graphs(server_args, phase), []
    for key in ("bs", "max_bs"):
        flag = f"--cuda-graph-{key.replace('_', '-')}-{phase}"
        flagged = getattr(server_args, f"cuda_graph_{key}_{phase}", None)
        places += [TypedSizes(CONFIG, key, named.get(key)), TypedSizes(flag, key, flagged)]
    return [place for place in places if place.value is not None and place.value != []]


def explicit_graph_max(server_args: Any, phase: str, backend: str = "") -> int | None:
    """Largest capture size that the user named for a phase, by flag, list or JSON; of a list for
    prefills as the host rounds it (``apply_deepep_adjustments``)."""
    typed = next(iter(typed_sizes(server_args, phase)), None)
    if typed is None:
        return None
    if typed.key == "bs":
        most = _largest(typed, phase)
        return ceil_to(most, GRAPH_MULTIPLE) if phase == "prefill" else most
    breakable = _named_backend(server_args, server_args, phase) in (None, BREAKABLE)
    if phase == "prefill" and backend == "deepep" and breakable and typed.value == 0:
        # Which it takes for unset, of breakable graphs; what is filled gives way to JSON.
        return UNSET_PREFILL_GRAPH if typed.flag == CONFIG else None
    try:
        return int(typed.value)
    except (TypeError, ValueError):
        raise _mistyped(typed, phase, "a whole number", "64") from None


def _largest(typed: TypedSizes, phase: str) -> int:
    try:
        if isinstance(typed.value, str):  # whose digits are numbers, too
            raise TypeError
        return max(map(int, typed.value))
    except (TypeError, ValueError):
        raise _mistyped(typed, phase, "a list of whole numbers", "[1, 2, 4]") from None


def _mistyped(typed: TypedSizes, phase: str, allowed: str, example: str) -> MoePluginError:
    got = f"{typed.flag}: {typed.value!r}"
    fix = f"{typed.key} such as {example}, or none for {phase}"
    return refusal([Rejection(f"batches to capture for {phase}", got, allowed, fix, kind="config")])


def graphs_enabled(server_args: Any, cfg: Any, phase: str) -> bool:
    """Whether a phase may capture graphs. Before the host decided: unless it was switched off."""
    if cfg.device == "cpu":
        return False
    if getattr(server_args, "_cuda_graph_config_locked", None) is not None:
        config = cfg.cuda_graph_config
        return config is not None and getattr(config, phase).backend != "disabled"
    backend = _named_backend(server_args, cfg, phase)
    if backend is not None:  # named, it wins over the flag for both phases, and over the role
        return bool(backend != "disabled")
    if phase == NOT_CAPTURED.get(cfg.disaggregation_mode):
        return False
    if getattr(cfg, "disable_cuda_graph", False):
        return False
    if phase == "prefill" and _leaves_prefills_out(server_args, cfg):
        return False
    return not getattr(cfg, f"disable_{phase}_cuda_graph", False)


def _leaves_prefills_out(server_args: Any, cfg: Any) -> bool:
    """Whether the host captures no prefills of the launch by itself, whatever else it decides."""
    from sglang.srt.arg_groups.overrides import model_config_of

    if cfg.pp_size > 1 or cfg.enable_two_batch_overlap or getattr(cfg, "dcp_size", 1) > 1:
        return True
    model = model_config_of(server_args)
    replays = getattr(model, "is_multimodal_breakable_cuda_graph_supported", True)
    return bool(model.is_multimodal and not replays)


def prefill_graphs(server_args: Any, cfg: Any, backend: str) -> bool:
    """Whether prefill graphs are captured: by itself the host does so over DeepEP alone."""
    named = _named_backend(server_args, cfg, "prefill")
    return graphs_enabled(server_args, cfg, "prefill") and (named or backend) in ("deepep", named)


def surely_captures_prefills(
    server_args: Any, cfg: Any, capability: tuple[int, int] | None
) -> bool:
    """Whether nothing keeps the host from capturing breakable prefill graphs, its own choice: no
    backend that was named, and none of ``disable_breakable_cudagraph_if_incompatible``,
    ``disable_prefill_cuda_graph_for_deepseek_trtllm_mla`` and ``capture_prefill_graph``."""
    from sglang.srt.arg_groups.overrides import model_config_of

    named = _named_backend(server_args, cfg, "prefill")
    adapters = getattr(cfg, "enable_lora", False) or getattr(cfg, "lora_paths", None)
    if named not in (None, BREAKABLE) or adapters:
        return False
    if named == BREAKABLE:
        return True
    attention = getattr(cfg, "prefill_attention_backend", None) or cfg.attention_backend
    by_default = "trtllm_mla" if (capability or (0, 0)) >= (10, 0) else ""  # of some models
    if (attention or by_default) == "trtllm_mla" or (getattr(cfg, "attn_cp_size", 1) or 1) > 1:
        return False
    model = model_config_of(server_args)
    names = getattr(model.hf_config, "architectures", None) or [""]
    linear = any(
        getattr(config, name, None)
        for config in (model.hf_config, model.hf_text_config)
        for name in ("linear_attn_config", "linear_num_heads")
    )
    return not (model.is_multimodal or linear or str(names[0]).startswith(_UNCAPTURED))
