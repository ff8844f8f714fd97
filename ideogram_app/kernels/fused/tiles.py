"""Tile sizes of the INT8 product by compute capability and shape: a table, no autotuning at run time.

**No row of this table was timed by us.** It stands on three things: published timings (below), what compilation
without a GPU says each tile needs (benchmarks/results/kernels-offline.json), and the counts in the comments. What would
settle it is `python benchmarks/tiles.py` on the card in question, which times these tiles and their neighbours at the
true shapes.

Published timings of INT8 tiles. A CUTLASS pipeline of S stages holds S steps in shared memory, one of Triton S - 1 on
mma.sync cards, so a 3 there is a 4 here; both give each warp 64 x 64 sums of the two large tiles.
  - comfy-kitchen's sweep of 14 CUTLASS tiles on an RTX A6000 (sm_86, 84 SMs; its a6000_int8_cfg_table.json): with
    4096 to 16384 rows 128x256x64 of 8 warps is 2 to 30 % faster than 128x128x64 of 4; with 2048 rows and N = 4096 it
    is 10 % slower; with 274 rows tiles of 64 rows win. Split sums (stream-K) gain 0 to 3 % with 4096 rows, up to 13 %
    with 16384, where their order of tiles may count as well, which `group_m` takes care of here.
  - vLLM's table for INT8 on sm_89: 256x128x64 in 3 stages and 128x128x64 in 5 above 256 rows, 64x64x128 down to 64.
  - PyTorch Inductor's two large INT8 templates, for 163 KB of shared memory and more: 128x256x128 in 3 stages.

Rows are cut at a few bounds, so a prompt of another length finds a tile that is compiled already. Left out: splitting K
and programs that stay for several tiles. At 4396 rows (1024 x 1024 and 300 words) the narrowest matrix, N = 4608, makes
630 tiles of 128x256; the last wave and the edges included, 94 % of the tile slots of 82 SMs do useful work, 97 % of
128, 91 % of 170, 94 % of 132. There is little to win, and on other SM counts than those the same table must do.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ideogram_app.errors import DeviceError

Capability = tuple[int, int]
UNBOUNDED = sys.maxsize


@dataclass(frozen=True)
class Tile:
    """What one program makes and with what."""

    block_m: int  # rows of the result
    block_n: int  # columns of the result
    block_k: int  # columns of both factors in one step
    group_m: int  # tiles of rows that take the same tiles of weights in turn, for the second-level cache
    warps: int
    stages: int  # depth of the pipeline of loads; stages - 1 steps lie in shared memory, on sm_90 one more

    @property
    def shared_bytes(self) -> int:
        """Of the steps in shared memory, both operands; what a compiler lays beside them is not counted."""
        return (self.block_m + self.block_n) * self.block_k * (self.stages - 1)


@dataclass(frozen=True)
class Choice:
    """A tile, for products of at most `rows` rows and at most `columns` columns."""

    rows: int
    columns: int
    tile: Tile


# Cards of 99 KB and more: sm_86, 87, 89, 120, 121, and what is not listed below. (There is sm_100: Triton 3.7 makes its
# INT8 products of the same mma.sync, not of the instructions that its tensor memory is for.) 128x256 sums of 256
# threads are 128 registers each; with the pointers 221 of the 255 there are, so one program fills an SM, and its 72 KB
# of shared memory fit. It reads 12 bytes a clock from the second-level cache at the full rate of 1024 multiply-adds a
# clock and SM, 128x128 reads 16. Two programs of 128x128 (48 KB each) fit an SM side by side and cut few rows more
# finely.
COMMON_TILES = (
    Choice(64, UNBOUNDED, Tile(64, 64, 128, group_m=8, warps=4, stages=4)),
    Choice(512, UNBOUNDED, Tile(64, 128, 64, group_m=8, warps=4, stages=5)),
    Choice(2048, 8191, Tile(128, 128, 64, group_m=8, warps=4, stages=4)),
    Choice(UNBOUNDED, UNBOUNDED, Tile(128, 256, 64, group_m=8, warps=8, stages=4)),
)
# sm_80 has twice the multiply-adds per clock: steps of 128 halve the barriers between them. 96 KB.
AMPERE_TILES = (*COMMON_TILES[:3], Choice(UNBOUNDED, UNBOUNDED, Tile(128, 256, 128, group_m=8, warps=8, stages=3)))
# sm_90 multiplies out of shared memory, 64 rows to a group of 4 warps, and holds one step more: 144 KB of 227.
HOPPER_TILES = (
    *COMMON_TILES[:2],
    Choice(2048, 8191, Tile(128, 128, 128, group_m=8, warps=8, stages=3)),
    Choice(UNBOUNDED, UNBOUNDED, Tile(128, 256, 128, group_m=8, warps=8, stages=3)),
)
TILES: dict[Capability, tuple[Choice, ...]] = {(8, 0): AMPERE_TILES, (9, 0): HOPPER_TILES}
# AMD: 64 KB of local data share (LDS) for a program, on every generation but gfx950. The widest tile takes 48 KB of it,
# the others 16 and less. Nobody seems to have published timings of INT8 tiles there: these are NVIDIA's, with fewer
# stages.
AMD_TILES = (
    Choice(64, UNBOUNDED, Tile(64, 64, 64, group_m=8, warps=4, stages=2)),
    Choice(512, UNBOUNDED, Tile(64, 128, 64, group_m=8, warps=4, stages=2)),
    Choice(2048, 8191, Tile(128, 128, 64, group_m=8, warps=8, stages=2)),
    Choice(UNBOUNDED, UNBOUNDED, Tile(128, 256, 64, group_m=8, warps=8, stages=3)),
)
# RDNA 2 adds four products at a time in ordinary registers (v_dot4): 128x256 sums and their operands spill 594 of them.
RDNA_2_TILES = (AMD_TILES[0], Choice(UNBOUNDED, UNBOUNDED, Tile(64, 128, 64, group_m=8, warps=8, stages=2)))
RDNA_2 = 10  # the first number of gfx1030
LEAST_TILE = Tile(64, 64, 64, group_m=8, warps=4, stages=2)  # 8 KB; fits whatever there is


def multiplies_int8(capability: Capability) -> bool:
    """Whether Triton compiles INT8 products there: seen for 8.0 to 12.1, seen to fail for 7.5."""
    return capability >= (8, 0)


def choices_of(capability: Capability, amd: bool = False) -> tuple[Choice, ...]:
    """The rows of the table for a capability, or for the first two numbers of an AMD gfx name.

    Raises:
        DeviceError: Triton has no INT8 product there.
    """
    if amd:
        return RDNA_2_TILES if capability[0] == RDNA_2 else AMD_TILES
    if not multiplies_int8(capability):
        got = f"{capability[0]}.{capability[1]}"
        raise DeviceError("This card has no INT8 product in Triton", expected="compute capability 8.0", got=got)
    return TILES.get(capability, COMMON_TILES)


def tile_for(capability: Capability, m: int, n: int, amd: bool = False) -> Tile:
    """The tile for (m, k) times (n, k), whatever k: every tile walks it in steps.

    Raises:
        DeviceError: as `choices_of`.
    """
    return next(row.tile for row in choices_of(capability, amd) if m <= row.rows and n <= row.columns)


def smaller_tiles(choices: tuple[Choice, ...], tile: Tile) -> tuple[Tile, ...]:
    """What to launch in place of a tile that a card refused: those of less shared memory, the largest first."""
    tiles = {choice.tile for choice in choices} | {LEAST_TILE}
    return tuple(sorted((each for each in tiles if each.shared_bytes < tile.shared_bytes), key=_by_size, reverse=True))


def _by_size(tile: Tile) -> tuple[int, int]:
    return tile.shared_bytes, tile.block_m * tile.block_n
