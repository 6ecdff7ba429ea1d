"""Launch choice: a pure function of shape, format, device and rows, expected and besides.

Nothing here touches a GPU. A measured table (`tuned/*.json`, keyed by device name) wins where it
knows the shape; elsewhere a heuristic decides.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from .formats import SWIGLU, Activation, Format

SM90_SHARED_BYTES = 232448  # the most one block of an H100 or H200 can have
RESERVED_BYTES = 4096  # barriers and scratch: the compiler reports under 3 KB
PACKED_RESERVED_BYTES = 8704  # up to 8.3 KB where weights are dequantised
MAX_STAGES = 24
ROW_TILES = (8, 16, 32, 64, 128)
# Up to here weights are the wide operand; above, fp8 scales would be one per column and thread.
FEW_ROWS_BF16 = 64
FEW_ROWS_FP8 = 32
SOME_ROWS = 128  # up to here memory binds: tiles of 64 rows in fp8, shallow ones in bf16
LEAST_ROWS_BESIDE = 16  # that a launch is chosen for where an expert may get more than expected
SUMS_TALLEST = 32  # rows of a tile whose sums and products fit the registers together
PACKED_STEP = 128  # channels of a step of packed weights: whole groups of any size
# Time of a tile of 64 channels and 128 rows relative to one of 128 channels, first GEMM.
HALF_TILE_COST = 0.55
SCALES_ALIGNED = 4  # rows: an expert's row scales start where the copy engine can


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


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
    """One layer: local experts, row capacity, hidden size, intermediate size, format, and the
    activation, which changes no tile."""

    experts: int
    capacity: int
    hidden: int
    inter: int
    format: Format
    activation: Activation = SWIGLU


@dataclass(frozen=True, slots=True)
class Tiles:
    """One launch. `block_n` counts the rows of each of a program's two weight tiles.

    Experts with more than `block_m` live rows are cut into tiles of `block_m_busy` rows. `swap_ab`
    makes weights the wide operand; weights are fetched `burst` steps of `block_k` channels at a
    time (one, where the depth does not divide into bursts). The `warps` that multiply form one or
    two `warp_groups`; two, with 64 rows each, only for tiles of 128 rows as the wide operand. A
    multiprocessor has room for `per_sm` programs. `scale_sums` applies the scales of packed
    integers to sums of a group, which is a step, instead of to weights.
    """

    block_n: int
    block_m: int
    block_m_busy: int
    block_k: int
    stages: int
    warps: int = 4
    per_sm: int = 1
    swap_ab: bool = True
    burst: int = 1
    warp_groups: int = 1
    scale_sums: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """A layer's two launches; `hopper` selects the warp-specialised kernels."""

    hopper: bool
    gate_up: Tiles
    down: Tiles


def ring_stages(
    block_n: int,
    block_m_busy: int,
    block_k: int,
    fmt: Format,
    warps: int,
    per_sm: int,
    swap_ab: bool,
) -> int:
    """Deepest ring that leaves room for what the compiler keeps in shared memory besides."""
    scales = 4 * max(block_m_busy, 32) if fmt.fp8_rows else 0
    if fmt.packed:
        scales = 2 * block_n * block_k // fmt.group_size * fmt.scale_bytes
    bits = 2 * block_n * fmt.weight_bits + block_m_busy * fmt.row_bits
    stage = bits * block_k // 8 + scales + 16
    # Weights wide, a warp stores what it computed; otherwise a bf16 tile changes hands.
    in_place = swap_ab and block_n >= 16 * warps
    reserved = RESERVED_BYTES if in_place else 2 * block_n * block_m_busy + 512
    if fmt.packed:
        reserved = PACKED_RESERVED_BYTES
    budget = SM90_SHARED_BYTES // per_sm - reserved
    return max(2, min(MAX_STAGES, budget // stage))


def hopper_tiles(
    block_n: int,
    block_m: int,
    block_m_busy: int,
    block_k: int,
    fmt: Format,
    warps: int = 4,
    per_sm: int = 1,
    swap_ab: bool = True,
    burst: int = 1,
    warp_groups: int = 1,
    scale_sums: bool = False,
) -> Tiles:
    """Tiles with the deepest ring that fits, in whole bursts.

    The multiplying warps give a stage back one step late: two bursts at least, or nobody moves.
    """
    stages = ring_stages(block_n, block_m_busy, block_k, fmt, warps, per_sm, swap_ab)
    burst = burst if stages >= 2 * burst else 1
    stages = stages // burst * burst
    return Tiles(
        block_n, block_m, block_m_busy, block_k, stages, warps, per_sm, swap_ab, burst, warp_groups,
        scale_sums,
    )  # fmt: skip


def row_tile(expected_m: int) -> int:
    """Smallest row tile that holds the expected rows."""
    return next((rows for rows in ROW_TILES if rows >= expected_m), ROW_TILES[-1])


def weights_wide(shape: Shape, expected_m: int) -> Launch:
    """Few rows: 8 rows cost 8. With the fewest, few experts are live as a rule, and their tiles
    are narrow so that there are more of them."""
    rows, fmt = row_tile(expected_m), shape.format
    if fmt.fp8_rows and rows == 8:
        gate_up = hopper_tiles(64, rows, 64, 128, fmt, burst=2)
        down = hopper_tiles(64, rows, 64, 64, fmt, per_sm=2)
        return Launch(True, gate_up, down)
    if fmt.fp8_rows:
        tiles = hopper_tiles(128, rows, 64, 128, fmt, 8, burst=2)
        return Launch(True, tiles, tiles)
    # A taller tile for hot experts costs stages, which only the shortest tile misses.
    busy = 64 if rows == 8 else 128
    gate_up = hopper_tiles(64, rows, busy, 64, fmt, burst=2)
    return Launch(True, gate_up, gate_up)


def sums_scaled(fmt: Format, tallest: int) -> bool:
    """Whether scales can be applied to sums, and tiles of at most `tallest` rows leave the
    registers for it."""
    return (
        fmt.packed and fmt.code == "integer" and fmt.group_size == PACKED_STEP
        and tallest <= SUMS_TALLEST
    )  # fmt: skip


def weights_packed(shape: Shape, expected_m: int) -> Launch:
    """Weights that are dequantised in registers are the wide operand for any rows. That keeps the
    multiplying warps busy about as long as 32 rows do the tensor cores: two programs keep pace with
    the stream. With the fewest rows scaling sums is less work than scaling weights. The most rows
    leave registers for four warps only."""
    rows, fmt = row_tile(expected_m), shape.format
    if rows > 64:
        tiles = hopper_tiles(64, rows, rows, PACKED_STEP, fmt)
        return Launch(True, tiles, tiles)
    busy = 32 if rows <= 16 else 64
    sums = rows == 8 and sums_scaled(fmt, busy)
    burst = 2 if rows <= 16 else 1
    tiles = hopper_tiles(64, rows, busy, PACKED_STEP, fmt, per_sm=2, burst=burst, scale_sums=sums)
    return Launch(True, tiles, tiles)


def some_rows(shape: Shape, expected_m: int) -> Launch:
    """Rows are the wide operand, and memory still binds."""
    fmt = shape.format
    if fmt.fp8_rows:
        burst = 2 if expected_m <= 64 else 1  # above, single steps beat bursts of two
        tiles = hopper_tiles(128, 64, 64, 128, fmt, 8, swap_ab=False, burst=burst)
    else:
        tiles = hopper_tiles(64, 128, 128, 64, fmt, 8, swap_ab=False, burst=2, warp_groups=2)
    return Launch(True, tiles, tiles)


def any_rows(shape: Shape) -> Launch:
    """FP8: good for few rows as for many. Experts with up to 64 rows have tiles of 64, the others
    of 128; on 8 to 64 rows it takes at most 1.08 times as long as the best launch for them, from
    128 to 1,024 at most 1.1 times (H200)."""
    tiles = hopper_tiles(128, 64, 128, 128, shape.format, 8, swap_ab=False)
    return Launch(True, tiles, tiles)


def many_rows(shape: Shape, expected_m: int, sms: int) -> Launch:
    """Multiplying binds: the tiles that fill the multiprocessors best."""
    row_tiles = shape.experts * ceil_div(expected_m, 128)

    def block_n(width: int, fused: bool) -> int:
        def waves(block: int) -> int:
            across = ceil_div(width, block if fused else 2 * block)
            return ceil_div(row_tiles * across, sms)

        return 64 if waves(64) * HALF_TILE_COST < waves(128) else 128

    fmt, fp8 = shape.format, shape.format.fp8_rows
    first = block_n(shape.inter, True)
    second = block_n(shape.hidden, False)
    if fp8 and expected_m <= 256 and first == second == 128:
        return any_rows(shape)
    groups = 1 if first == 128 else 2
    depth = 128 if fp8 else 64
    gate_up = hopper_tiles(first, 128, 128, depth, fmt, 8, 1, False, warp_groups=groups)
    depth = first if fp8 else 64
    down = hopper_tiles(second, 128, 128, depth, fmt, 8, 1, False, warp_groups=2)
    return Launch(True, gate_up, down)


def portable_launch(shape: Shape, expected_m: int) -> Launch:
    """Launches of the pointer-based kernels."""
    rows = max(16, row_tile(expected_m))
    tiles = Tiles(64, rows, rows, 64 if shape.format.weight_bits == 8 else 32, 3)
    return Launch(False, tiles, tiles)


def heuristic(shape: Shape, expected_m: int, device: Device) -> Launch:
    """Launches for a shape that no table covers."""
    if not device.has_wgmma:
        return portable_launch(shape, expected_m)
    if shape.format.packed:
        return weights_packed(shape, expected_m)
    if expected_m <= (FEW_ROWS_FP8 if shape.format.fp8_rows else FEW_ROWS_BF16):
        return weights_wide(shape, expected_m)
    if expected_m <= SOME_ROWS:
        return some_rows(shape, expected_m)
    return many_rows(shape, expected_m, device.sms)


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
    rows = min(1024, max(8, 1 << max(0, expected_m - 1).bit_length()))
    return f"{shape.experts}x{shape.hidden}x{shape.inter}-{shape.format.tuning}-{rows}"


def entry_of_launch(launch: Launch) -> dict:
    """JSON form of a launch."""
    return asdict(launch)


def launch_from_entry(entry: dict) -> Launch:
    """Inverse of `entry_of_launch`."""
    return Launch(entry["hopper"], Tiles(**entry["gate_up"]), Tiles(**entry["down"]))


def pick_launch(shape: Shape, expected_m: int, device: Device, beside_m: int = 0) -> Launch:
    """The measured launch for this shape and row count, or the heuristic's.

    `beside_m`: rows that an expert may get besides the expected ones, where other ranks prefill
    while a decode graph is replayed. With any the launch for 8 rows is avoided: on 128 to 1,024 it
    takes up to 1.9 times as long as the best, where that for 16 takes at most 1.02 times as long on
    8. With many, FP8 has one for both, whatever was measured for few; in bf16 that for 16 takes at
    most 1.16 times as long as the best (H200).
    """
    fmt = shape.format
    if fmt.fp8_rows and shape.capacity % SCALES_ALIGNED:
        return portable_launch(shape, expected_m)
    if beside_m > 0:
        expected_m = max(expected_m, LEAST_ROWS_BESIDE)
    if device.has_wgmma and fmt.fp8_rows and expected_m <= SOME_ROWS <= beside_m:
        return any_rows(shape)
    entry = tuned_table(device.name).get(table_key(shape, expected_m))
    return launch_from_entry(entry) if entry else heuristic(shape, expected_m, device)
