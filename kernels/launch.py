"""Launch choice: a pure function of shape, precision, expected rows and device.

Nothing here touches a GPU. A measured table (`tuned/*.json`, keyed by device name) wins where it
knows the shape; elsewhere a heuristic decides.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources

SM90_SHARED_BYTES = 232448  # the most one block of an H100 or H200 can have
RESERVED_BYTES = 4096  # barriers and scratch: the compiler reports under 3 KB
WIDE_RESERVED_BYTES = 20480  # the same where a warp's product is not what it stores
MAX_STAGES = 24
ROW_TILES = (8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Device:
    """What a launch depends on."""

    name: str
    capability: tuple[int, int]
    sms: int

    @property
    def has_wgmma(self) -> bool:
        return self.capability == (9, 0)

    @property
    def has_fp8(self) -> bool:
        return self.capability >= (8, 9)


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer: local experts, row capacity, hidden size, intermediate size."""

    experts: int
    capacity: int
    hidden: int
    inter: int
    fp8: bool


@dataclass(frozen=True, slots=True)
class Tiles:
    """One launch. `channels` counts the rows of each of a program's two weight tiles.

    Experts with more than `rows` live rows are cut into tiles of `many` rows. `swap` makes weights
    the wide operand; `split` programs share the depth of one tile.
    """

    channels: int
    rows: int
    many: int
    depth: int
    stages: int
    warps: int = 4
    per_sm: int = 1
    swap: bool = True
    split: int = 1


@dataclass(frozen=True, slots=True)
class Launch:
    """A layer's two launches; `hopper` selects the warp-specialised kernels."""

    hopper: bool
    gate_up: Tiles
    down: Tiles


def ring_stages(
    channels: int, many: int, depth: int, fp8: bool, warps: int = 4, per_sm: int = 1
) -> int:
    """Deepest ring that leaves room for what the compiler keeps in shared memory besides."""
    itemsize = 1 if fp8 else 2
    stage = (2 * channels + many) * depth * itemsize + (4 * max(many, 32) if fp8 else 0) + 16
    reserved = RESERVED_BYTES if channels >= 16 * warps else WIDE_RESERVED_BYTES
    budget = SM90_SHARED_BYTES // per_sm - reserved
    return max(2, min(MAX_STAGES, budget // stage))


def hopper_tiles(
    channels: int,
    rows: int,
    many: int,
    depth: int,
    fp8: bool,
    warps: int = 4,
    per_sm: int = 1,
    swap: bool = True,
    split: int = 1,
) -> Tiles:
    """Tiles with the deepest ring that fits."""
    stages = ring_stages(channels, many, depth, fp8, warps, per_sm)
    return Tiles(channels, rows, many, depth, stages, warps, per_sm, swap, split)


def row_tile(expected_m: int) -> int:
    """Smallest row tile that holds the expected rows."""
    return next((rows for rows in ROW_TILES if rows >= expected_m), ROW_TILES[-1])


def depth_split(experts: int, hidden: int) -> int:
    """Programs that share one tile of the second GEMM: few experts have too few tiles for every
    multiprocessor. Depends on the shape alone, so that the bits do not depend on the routing."""
    tiles = experts * -(-hidden // 128)
    return 4 if tiles <= 33 else 2 if tiles <= 66 else 1


def heuristic(shape: Shape, expected_m: int, device: Device) -> Launch:
    """Launches for a shape that no table covers."""
    rows, fp8 = row_tile(expected_m), shape.fp8
    if not device.has_wgmma:
        tiles = Tiles(64, max(rows, 16), max(rows, 16), 64 if fp8 else 32, 3)
        return Launch(False, tiles, tiles)
    if expected_m > 64:
        depth = 128 if fp8 else 64
        tiles = hopper_tiles(128, 128, 128, depth, fp8, warps=8, swap=False)
        return Launch(True, tiles, tiles)
    # 64 channels also make a group of the re-quantisation, hence the depth of the second GEMM.
    per_sm = 2 if fp8 else 1
    split = depth_split(shape.experts, shape.hidden)
    gate_up = hopper_tiles(64, rows, 64, 128 if fp8 else 64, fp8, per_sm=per_sm)
    down = hopper_tiles(64, rows, 64, 64, fp8, per_sm=per_sm, split=split)
    return Launch(True, gate_up, down)


@cache
def tuned_table(device_name: str) -> dict[str, dict]:
    """Measured launches of one device, keyed by `table_key`; empty where none were measured."""
    path = resources.files(__package__) / "tuned" / (device_name.replace(" ", "_") + ".json")
    return json.loads(path.read_text())["launches"] if path.is_file() else {}


def table_key(shape: Shape, expected_m: int) -> str:
    """Capacity is left out: it changes no tile. Up to 8 rows cost the same."""
    dtype = "fp8" if shape.fp8 else "bf16"
    rows = min(1024, max(8, 1 << max(0, expected_m - 1).bit_length()))
    return f"{shape.experts}x{shape.hidden}x{shape.inter}-{dtype}-{rows}"


def encode_launch(launch: Launch) -> dict:
    """JSON form of a launch."""
    return asdict(launch)


def decode_launch(entry: dict) -> Launch:
    """Inverse of `encode_launch`."""
    return Launch(entry["hopper"], Tiles(**entry["gate_up"]), Tiles(**entry["down"]))


def pick_launch(shape: Shape, expected_m: int, device: Device) -> Launch:
    """The measured launch for this shape and row count, or the heuristic's."""
    entry = tuned_table(device.name).get(table_key(shape, expected_m))
    return decode_launch(entry) if entry else heuristic(shape, expected_m, device)
