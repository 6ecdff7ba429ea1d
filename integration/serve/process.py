"""What the host knows in this process: its arguments, the plan, and the batch of this forward."""

from __future__ import annotations

from typing import Any

from ...planning.plan import Plan
from ...runtime.metadata import DPMetadata
from ..attached_plan import plan_of


def host_config() -> Any:
    """The host's resolved arguments in this process."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.runtime_context import get_server_args

    return resolving_view(get_server_args())


def device_type() -> str:
    """The host's device in this process: ``cuda``, ``cpu``, ..."""
    return str(host_config().device)


def joins_serving_ranks() -> bool:
    """Whether this process takes the place of a rank of elastic EP while the others serve on. Ranks
    that are added start in a group of their own."""
    return getattr(host_config(), "ep_join_mode", None) == "recover"


def current_plan() -> Plan | None:
    """The plan that this process runs under, or None."""
    from sglang.srt.runtime_context import get_server_args

    return plan_of(get_server_args())


def current_metadata() -> DPMetadata | None:
    """Tokens per all-to-all rank in this forward; None where the host does not say.

    With ``--moe-dense-tp-size 1 --enable-dp-lm-head`` the host tells each group its own tokens
    only (``require_mlp_tp_gather``).
    """
    from sglang.srt.layers.dp_attention import get_dp_global_num_tokens

    tokens = get_dp_global_num_tokens()
    plan = current_plan()
    if tokens is None or plan is None:
        return None
    return DPMetadata.from_global_num_tokens(tokens, plan.attn_tp_size, plan.ep_size)


def current_mode() -> str:
    """``extend`` or ``decode``, as the host resolves DeepEP's mode."""
    from sglang.srt.layers.dp_attention import get_is_extend_in_batch

    return "extend" if get_is_extend_in_batch() else "decode"
