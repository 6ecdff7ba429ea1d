"""Tables that stand for the plugin's code."""

from __future__ import annotations

from collections.abc import Mapping

from moe_plugin.envs import VARIABLES
from moe_plugin.planning.weight_formats import FORMATS, ComputeCapability, HostExperts, OwnExperts

_ACTIVATIONS = {
    "silu": "SwiGLU",
    "silu, limited": "limited",
    "silu, clamped": "clamped",
}
"""Names in plans -> words; an activation without one is shown by its name."""


def weight_formats() -> str:
    """Whose experts compute what; formats of one answer share a row."""
    titles: dict[tuple[str, str], list[str]] = {}
    refused = []
    for row in FORMATS.values():
        if row.own is None and not row.host:
            refused.append(row.title)
        else:
            titles.setdefault((_own(row.own), _host(row.host)), []).append(row.title)
    lines = [
        "| weights of the experts | the plugin's experts | SGLang's experts, inside the budgets |",
        "|---|---|---|",
        *(f"| {'; '.join(names)} | {own} | {host} |" for (own, host), names in titles.items()),
        "",
        "Refused, since SGLang's own MoE layer fails with them behind DeepEP: "
        + f"{', '.join(refused)}.",
    ]
    return "\n".join(lines)


def _own(experts: OwnExperts | None) -> str:
    if experts is None:
        return "–"
    # By length, so that the plain activation comes before its variants.
    names = sorted(experts.activations, key=lambda name: (len(name), name))
    words = [_ACTIVATIONS.get(name, name) for name in names]
    return ", ".join(words) + (f"; before {_sm(experts.below)}" if experts.below else "")


def _host(experts: Mapping[str, HostExperts]) -> str:
    found = []
    for runner, how in experts.items():
        found.append(f"`{runner}`" + (f" from {_sm(how.least)} on" if how.least else ""))
    return ", ".join(found) or "–"


def _sm(capability: ComputeCapability) -> str:
    return "SM{}{}".format(*capability)


def variables() -> str:
    """The plugin's environment variables."""
    lines = ["| variable | default | |", "|---|---|---|"]
    for variable in VARIABLES:
        default = "" if variable.default in (None, False) else f"`{variable.default}`"
        lines.append(f"| `{variable.name}` | {default} | {variable.doc} |")
    return "\n".join(lines)
