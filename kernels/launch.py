"""Launch choice: a pure function of shape, precision, expected rows and device.

Nothing here touches a GPU. A measured table (`tuned/*.json`, keyed by device name) wins where it
knows the shape; elsewhere a heuristic decides.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

SM90_SHARED_BYTES = 232448  # the most one block of an H100 or H200 can have
RESERVED_BYTES = 4096  # barriers and scratch: the compiler reports under 3 KB
MAX_STAGES = 24
ROW_TILES = (8, 16, 32, 64, 128)
# Up to here weights are the wide operand; above, fp8 scales would be one per column and thread.
FEW_ROWS_BF16 = 64
FEW_ROWS_FP8 = 32
SOME_ROWS = 128  # up to here memory binds: tiles of 64 rows in fp8, shallow ones in bf16
# Time of a tile of 64 channels and 128 rows relative to one of 128 channels, first GEMM.
HALF_TILE_COST = 0.55


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
    the wide operand; `split` programs share the depth of one tile; weights are fetched `burst`
    steps at a time (one, where the depth does not divide into bursts). The `warps` that multiply
    form one group or two; two, with 64 rows each, only for tiles of 128 rows as the wide operand.
    A multiprocessor has room for `per_sm` programs.
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
    burst: int = 1
    groups: int = 1


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
    burst: int = 1,
    groups: int = 1,
) -> Tiles:
    """Tiles with the deepest ring that fits, in whole bursts.

    The multiplying warps give a stage back one step late: two bursts at least, or nobody moves.
    """
    stages = ring_stages(channels, many, depth, fp8, warps, per_sm, swap)
    burst = burst if stages >= 2 * burst else 1
    stages = stages // burst * burst
    return Tiles(channels, rows, many, depth, stages, warps, per_sm, swap, split, burst, groups)


def row_tile(expected_m: int) -> int:
    """Smallest row tile that holds the expected rows."""
    return next((rows for rows in ROW_TILES if rows >= expected_m), ROW_TILES[-1])


def depth_split(experts: int, hidden: int) -> int:
    """Programs that share one tile of the second GEMM: few experts have too few tiles for every
    multiprocessor. Depends on the shape alone, so that the bits do not depend on the routing."""
    tiles = experts * -(-hidden // 128)
    return 4 if tiles <= 33 else 2 if tiles <= 66 else 1


def weights_wide(shape: Shape, expected_m: int, split: int) -> Launch:
    """Few rows: 8 rows cost 8. With the fewest, few experts are live as a rule, and their tiles
    are narrow so that there are more of them."""
    rows = row_tile(expected_m)
    if shape.fp8 and rows == 8:
        gate_up = hopper_tiles(64, rows, 64, 128, True, burst=2)
        return Launch(True, gate_up, hopper_tiles(64, rows, 64, 64, True, per_sm=2, split=split))
    if shape.fp8:
        tiles = hopper_tiles(128, rows, 64, 128, True, 8, burst=2)
        return Launch(True, tiles, replace(tiles, split=split))
    # A taller tile for hot experts costs stages, which only the shortest tile misses, and spills
    # where parts of a split depth are stored.
    many = 64 if rows == 8 else 128
    gate_up = hopper_tiles(64, rows, many, 64, False, burst=2)
    many = many if split == 1 else 64
    return Launch(True, gate_up, hopper_tiles(64, rows, many, 64, False, split=split, burst=2))


def some_rows(shape: Shape, split: int) -> Launch:
    """Rows are the wide operand, and memory still binds."""
    if shape.fp8:
        tiles = hopper_tiles(128, 64, 64, 128, True, 8, swap=False, burst=2)
    else:
        tiles = hopper_tiles(64, 128, 128, 64, False, 8, swap=False, burst=2, groups=2)
    return Launch(True, tiles, replace(tiles, split=split))


def many_rows(shape: Shape, expected_m: int, split: int, sms: int) -> Launch:
    """Multiplying binds: the tiles that fill the multiprocessors best."""
    row_tiles = shape.experts * -(-expected_m // 128)

    def channels(width: int, parts: int, fused: bool) -> int:
        def waves(channels: int) -> int:
            across = -(-width // (channels if fused else 2 * channels))
            return -(-row_tiles * across * parts // sms)

        return 64 if waves(64) * HALF_TILE_COST < waves(128) else 128

    fp8 = shape.fp8
    parts = split if expected_m <= 256 else 1
    first = channels(shape.inter, 1, True)
    second = channels(shape.hidden, parts, False)
    if fp8 and expected_m <= 256 and first == 128:
        gate_up = hopper_tiles(128, 64, 128, 128, True, 8, swap=False)
    else:
        groups = 1 if first == 128 else 2
        gate_up = hopper_tiles(first, 128, 128, 128 if fp8 else 64, fp8, 8, 1, False, groups=groups)
    depth = first if fp8 else 64
    groups = 2 if fp8 or second == 64 else 1
    down = hopper_tiles(second, 128, 128, depth, fp8, 8, 1, False, parts, groups=groups)
    return Launch(True, gate_up, down)


def portable_launch(shape: Shape, expected_m: int) -> Launch:
    """Launches of the pointer-based kernels."""
    rows = max(16, row_tile(expected_m))
    tiles = Tiles(64, rows, rows, 64 if shape.fp8 else 32, 3)
    return Launch(False, tiles, tiles)


def heuristic(shape: Shape, expected_m: int, device: Device) -> Launch:
    """Launches for a shape that no table covers."""
    if not device.has_wgmma:
        return portable_launch(shape, expected_m)
    split = depth_split(shape.experts, shape.hidden)
    if expected_m <= (FEW_ROWS_FP8 if shape.fp8 else FEW_ROWS_BF16):
        return weights_wide(shape, expected_m, split)
    if expected_m <= SOME_ROWS:
        return some_rows(shape, split)
    return many_rows(shape, expected_m, split, device.sms)


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
