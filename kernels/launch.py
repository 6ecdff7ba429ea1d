"""Launch choice: a pure function of shape, precision, expected rows and device.

Nothing here touches a GPU. A measured table (`tuned/*.json`, keyed by device name) wins where it
knows the shape; elsewhere a heuristic decides.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

SM90_SHARED_BYTES = 232448  # the most one block of an H100 or H200 can have
RESERVED_BYTES = 4096  # barriers and scratch: the compiler reports under 3 KB
MAX_STAGES = 24
ROW_TILES = (8, 16, 32, 64, 128)
# Up to here weights are the wide operand. On an H200, tiles of 64 rows are faster from 16 rows on
# in fp8 (scales per row, not per column) and from 32 on in bf16.
FEW_ROWS_FP8 = 8
FEW_ROWS_BF16 = 16
# Time of one tile (channels, rows, per multiprocessor) with rows wide, per slot, relative to the
# largest: DeepSeek-V3, 512 rows, first GEMM, H200.
RELATIVE_COST = {(128, 128, 1): 1.0, (128, 64, 1): 0.65, (64, 64, 2): 0.6}


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
    channels: int,
    many: int,
    depth: int,
    fp8: bool,
    warps: int = 4,
    per_sm: int = 1,
    swap: bool = True,
) -> int:
    """Deepest ring that leaves room for what the compiler keeps in shared memory besides."""
    itemsize = 1 if fp8 else 2
    stage = (2 * channels + many) * depth * itemsize + (4 * max(many, 32) if fp8 else 0) + 16
    # Weights wide, a warp stores what it computed; otherwise a bf16 tile changes hands.
    in_place = swap and channels >= 16 * warps
    reserved = RESERVED_BYTES if in_place else 2 * channels * many + 512
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
    stages = ring_stages(channels, many, depth, fp8, warps, per_sm, swap)
    return Tiles(channels, rows, many, depth, stages, warps, per_sm, swap, split)


def row_tile(expected_m: int) -> int:
    """Smallest row tile that holds the expected rows."""
    return next((rows for rows in ROW_TILES if rows >= expected_m), ROW_TILES[-1])


def depth_split(experts: int, hidden: int) -> int:
    """Programs that share one tile of the second GEMM: few experts have too few tiles for every
    multiprocessor. Depends on the shape alone, so that the bits do not depend on the routing."""
    tiles = experts * -(-hidden // 128)
    return 4 if tiles <= 33 else 2 if tiles <= 66 else 1


def rows_wide(
    experts: int, width: int, expected_m: int, depth: int, fused: bool, fp8: bool, sms: int
) -> Tiles:
    """Tiles with rows as the wide operand: those of RELATIVE_COST that finish first."""

    def cost(key: tuple[int, int, int]) -> float:
        channels, rows, per_sm = key
        across = -(-width // (channels if fused else 2 * channels))
        tiles = experts * -(-expected_m // rows) * across
        return -(-tiles // (sms * per_sm)) * RELATIVE_COST[key]

    # The first GEMM's channels are a group of the re-quantisation and must divide the depth.
    channels, rows, per_sm = min(RELATIVE_COST, key=cost)
    warps = 8 if rows == 128 else 4
    return hopper_tiles(channels, rows, rows, depth, fp8, warps, per_sm, swap=False)


def portable_launch(shape: Shape, expected_m: int) -> Launch:
    """Launches of the pointer-based kernels."""
    rows = max(16, row_tile(expected_m))
    tiles = Tiles(64, rows, rows, 64 if shape.fp8 else 32, 3)
    return Launch(False, tiles, tiles)


@cache
def heuristic(shape: Shape, expected_m: int, device: Device) -> Launch:
    """Launches for a shape that no table covers."""
    if not device.has_wgmma:
        return portable_launch(shape, expected_m)
    rows, fp8, experts = row_tile(expected_m), shape.fp8, shape.experts
    split = depth_split(experts, shape.hidden)
    full = 128 if fp8 else 64
    few = expected_m <= (FEW_ROWS_FP8 if fp8 else FEW_ROWS_BF16)
    per_sm = 2 if fp8 else 1
    if few:
        gate_up = hopper_tiles(64, rows, 64, 128, fp8, per_sm=per_sm)
    else:
        gate_up = rows_wide(experts, shape.inter, expected_m, full, True, fp8, device.sms)
    depth = gate_up.channels if fp8 else gate_up.depth
    if few or (split > 1 and expected_m <= 64):
        down = hopper_tiles(64, min(rows, 64), 64, depth, fp8, per_sm=per_sm, split=split)
    else:
        down = rows_wide(experts, shape.hidden, expected_m, depth, False, fp8, device.sms)
    return Launch(True, gate_up, down)


def table_path(device_name: str) -> Path:
    """Where the measured table of a device lives in the installed package."""
    return Path(__file__).with_name("tuned") / (device_name.replace(" ", "_") + ".json")


@cache
def tuned_table(device_name: str) -> dict[str, dict]:
    """Measured launches of one device, keyed by `table_key`; empty where none were measured."""
    path = table_path(device_name)
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
