"""The bars of the kernel benchmark, applied to what `bench.py bars` wrote.

A bar holds over all cells of one model and precision; its worst cell is shown. Cells whose mean no
batch within the capacity can reach have `reachable` false: they are measured and not judged.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

Cell = dict[str, Any]
FEW = 64  # rows per expert up to which a layer is a weight stream
STREAM_SOUND_TBPS = 2.9  # an H100 SXM that streams less than this is not itself
SHARE = {"bf16": 0.95, "fp8": 0.90}
SMALL_SHARE = 0.85
RATIO = {"bf16": 1.0, "fp8": 1.05}
SMALL_RATIO = {"bf16": 1.05, "fp8": 1.15}
MANY_RATIO = 0.75
ONE_HOT = 1.3


@dataclass(frozen=True)
class Bar:
    """One bar and its worst cell."""

    name: str
    bound: float
    value: float
    rows: int
    cells: int
    ok: bool
    note: str = ""

    def __str__(self) -> str:
        word = "ok  " if self.ok else "MISS"
        worst = f"worst {self.value:.3f} at {self.rows} rows of {self.cells} cells"
        return f"{word} {self.name} {self.bound}: {worst}{self.note}"


def share(cell: Cell) -> float:
    """Of the stream ceiling."""
    return float(cell["stream_fraction"])


def ratio(cell: Cell) -> float:
    """DeepGEMM's time over ours."""
    return float(cell["deepgemm_us"]) / float(cell["us"])


def ceilings_sound(device: str, ceilings: dict[str, float]) -> bool:
    """Whether the run counts at all."""
    stream = max(ceilings["copy_TBps"], ceilings["read_TBps"])
    return "H100" not in device or "PCIe" in device or stream >= STREAM_SOUND_TBPS


def verdict(cells: list[Cell]) -> list[Bar]:
    """Every bar that the cells can show."""
    found = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        for kind in dict.fromkeys((c["dtype"], c["format"]) for c in cells):
            mine = [c for c in cells if c["model"] == model and (c["dtype"], c["format"]) == kind]
            label, judged = f"{model} {kind[1]}", [c for c in mine if c["reachable"]]
            found += _of_one(label, model, kind[0], judged)
    return found


def _of_one(label: str, model: str, dtype: str, cells: list[Cell]) -> Iterator[Bar]:
    small = model.startswith("Qwen")
    uniform = [c for c in cells if c["routing"] == "uniform"]
    few = [c for c in uniform if c["rows"] <= FEW]
    against = [c for c in uniform if "deepgemm_us" in c]
    bound = SMALL_SHARE if small else SHARE[dtype]
    for bar in _least(f"{label}: share of the stream, rows <= {FEW}, at least", few, share, bound):
        plain = min(c["read_us"] / c["us"] for c in few)
        yield replace(bar, note=f"; {plain:.3f} of a plain read of the weights in two launches")
    if not model.endswith("EP128"):
        bound = (SMALL_RATIO if small else RATIO)[dtype]
        faster = [c for c in against if c["rows"] <= FEW]
        yield from _least(f"{label}: over DeepGEMM, rows <= {FEW}, at least", faster, ratio, bound)
    busy = [c for c in against if c["rows"] == 128]
    yield from _least(f"{label}: over DeepGEMM, 128 rows, at least", busy, ratio, 1.0)
    many = [c for c in against if c["rows"] >= 256]
    yield from _least(f"{label}: over DeepGEMM, rows >= 256, at least", many, ratio, MANY_RATIO)
    hot = [c for c in cells if c["routing"] == "one-hot"]
    if hot:
        worst = max(hot, key=lambda c: c["over_floor"])
        value = float(worst["over_floor"])
        name = f"{label}: one-hot over its floor, at most"
        yield Bar(name, ONE_HOT, value, worst["rows"], len(hot), value <= ONE_HOT)


def _least(
    name: str, cells: list[Cell], value: Callable[[Cell], float], bound: float
) -> Iterator[Bar]:
    if cells:
        worst = min(cells, key=value)
        yield Bar(name, bound, value(worst), worst["rows"], len(cells), value(worst) >= bound)
