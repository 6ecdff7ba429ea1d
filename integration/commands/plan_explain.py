"""``moe-plugin plan --explain BUDGET``: why one number is what it is."""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError, explain
from ...planning.plan import T_NAME

_SOURCES = {
    "user": "typed",
    "default": "a default",
    "derived": "follows from other values",
    "host": "chosen by SGLang",
}


def explained(answer: dict[str, Any], name: str) -> dict[str, Any]:
    """One number of a plan, and what it follows from.

    Args:
        answer: the JSON object of the plan.
        name: a budget's name or flag, or a part of either that no other has; or a part of
            ``memory``, which is told beside all the others.

    Raises:
        ConfigError: the plan has no such budget, or more than one.
    """
    budgets: list[dict[str, Any]] = answer["budgets"]
    asked = name.strip().lstrip("-").replace("-", "_").lower()
    exact = [b for b in budgets if asked in _names(b)]
    found = exact or [b for b in budgets if any(asked in known for known in _names(b))]
    memory: dict[str, Any] = answer.get("memory") or {}
    if not exact and asked in memory:
        return {"name": asked, "value": memory[asked], "memory": memory}
    if len(found) != 1:
        allowed = [*(budget["name"] for budget in budgets), *memory]
        if not allowed:
            allowed = [f"none here: {answer['capability']['reason']}"]
        raise ConfigError(
            explain(
                "--explain",
                got=repr(name),
                allowed=f"one of {', '.join(allowed)}",
                fix=f"--explain {T_NAME}" if budgets else "plan a launch that is batched",
            )
        )
    tokens = next((b for b in budgets if b["name"] == T_NAME and b is not found[0]), None)
    resolved = (answer["resolved"] or {}).get(found[0]["name"])
    return {**found[0], "follows_from": tokens, "resolved": resolved, "verdict": answer["verdict"]}


def _names(budget: dict[str, Any]) -> set[str]:
    flag = str(budget["flag"]).lstrip("-").replace("-", "_").lower()
    return {budget["name"].lower(), flag} - {""}


def render(budget: dict[str, Any]) -> str:
    """The same in sentences, for people."""
    if "memory" in budget:
        parts = [f"  {k} = {_amount(k, v)}" for k, v in budget["memory"].items() if v is not None]
        head = (
            f"{budget['name']} = {_amount(budget['name'], budget['value'])}, of one rank's memory:"
        )
        return "\n".join([head, *parts])
    lines = [_first(budget), f"  arithmetic: {budget['arithmetic']}"]
    headroom = budget["headroom"]
    if headroom is None:
        left = ""
    elif headroom < 0:
        left = f"; {-headroom} too many"
    else:
        left = f"; {headroom} left below it" if headroom else "; nothing is left below it"
    lines.append(f"  limit that binds: {budget['limit']}{left}")
    if tokens := budget["follows_from"]:
        lines.append(
            f"  T: {tokens['value']} tokens per rank, {_SOURCES[tokens['source']]} "
            f"({tokens['arithmetic']}), {tokens['limit']}; {tokens['flag']} changes it"
        )
    if budget["resolved"] not in (None, budget["value"]):
        lines.append(
            f"  SGLang ends with: {budget['resolved']}, counted or rounded its own way "
            "(per DP group, in pages, by capture sizes)"
        )
    if budget["flag"]:
        lines.append(f"  set it with: {budget['flag']}")
    return "\n".join(lines)


def _amount(name: str, value: Any) -> str:
    of_a_size = name.endswith("_bytes") and abs(value) >= 2**20
    return f"{value} ({value / 2**30:.2f} GiB)" if of_a_size else str(value)


def _first(budget: dict[str, Any]) -> str:
    value = "not used" if budget["value"] is None else budget["value"]
    return f"{budget['name']} = {value}, {_SOURCES[budget['source']]}"
