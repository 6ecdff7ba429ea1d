"""Whether a checkpoint's 4-bit experts are ones that our kernels decode, by its own description."""

from __future__ import annotations

from typing import Any

from ...kernels.formats import FORMATS

INT4 = "_int4"
"""Ends the name of a quantisation whose checkpoint has such experts."""
_GROUPS = frozenset(fmt.group_size for fmt in FORMATS.values() if fmt.packed)


def is_int4(name: str, config: dict[str, Any], depths: tuple[int, ...]) -> bool:
    """Whether every group of the checkpoint has them.

    Args:
        name: the host's, of the quantisation.
        config: the checkpoint's ``quantization_config``.
        depths: inputs of the experts' GEMMs. Where they are no whole groups, the host halves the
            groups or rounds their number down.
    """
    if name == "compressed-tensors":
        groups = list((config.get("config_groups") or {}).values())
        return bool(groups) and all(_is_int4_group(group, config, depths) for group in groups)
    bits, group = config.get("bits"), config.get("group_size")
    if bits != 4 or not _fills(group, depths) or config.get("desc_act"):
        return False
    if name == "awq_marlin":
        return bool(config.get("zero_point"))
    if name == "gptq_marlin":
        return bool(config.get("sym"))
    return name == "moe_wna16"


def has_zero_points(config: dict[str, Any]) -> bool:
    """Whether they are stored with zero points."""
    groups = (config.get("config_groups") or {}).values()
    if any(not (group.get("weights") or {}).get("symmetric", True) for group in groups):
        return True
    return bool(config.get("zero_point", not config.get("sym", True)))


def _fills(size: Any, depths: tuple[int, ...]) -> bool:
    return size in _GROUPS and not any(depth % size for depth in depths)


def _is_int4_group(group: dict[str, Any], config: dict[str, Any], depths: tuple[int, ...]) -> bool:
    """Symmetric ones: the host's loader turns codes and scales, but not zero points, which then do
    not fit their parameter."""
    weights = group.get("weights") or {}
    return (
        (group.get("format") or config.get("format")) == "pack-quantized"
        and (weights.get("type"), weights.get("num_bits")) == ("int", 4)
        and weights.get("strategy") == "group"
        and _fills(weights.get("group_size"), depths)
        and weights.get("symmetric", True)
        and weights.get("actorder") in (None, "static", "weight")
        and not group.get("input_activations")
    )
