"""Blocks in the lanes of vector registers, and what Q4_K, Q5_K and Q6_K share there.

Eight blocks are one tile. `x[k * lanes + lane]` is weight k of sub-block `lane // 8` of block `lane % 8`, so a loop
over lanes is the same straight-line arithmetic on 64 or 128 independent sub-blocks, which LLVM turns into vector
instructions of whatever width the processor has. Sums over a sub-block are sums of registers.

All numbers are float32, and results are those of `k_search.py` to the bit: the same products, sums and quotients in
the same order, which the compiler may neither fuse nor re-associate.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from ideogram_app.quantization.k_search import LARGEST_HALF, SMALLEST_RANGE

TILE_LANES = 8  # blocks

# A Python number would turn all arithmetic around it into float64.
ZERO, ONE, TWO, INFINITY = np.float32(0), np.float32(1), np.float32(2), np.float32(np.inf)
SMALLEST_SPREAD = np.float32(SMALLEST_RANGE)
# fp16 as seen from float32: the largest number, the end of its subnormals and the distance between those. Added to
# 0.75, whose own neighbours are as far apart, a number below that end is rounded to one of them.
LARGEST, SUBNORMAL_END, SUBNORMAL_UNIT = np.float32(LARGEST_HALF), np.float32(2**-14), np.float32(2**-24)
SUBNORMAL_ROUNDER = np.float32(0.75)

Array = np.ndarray[Any, np.dtype[np.float32]]
Three = tuple[Any, Any, Any]  # of float32, inside compiled code

# Division is IEEE's and raises nothing: a way out of a loop would keep it from becoming vectors.
inline = numba.njit(forceinline=True, error_model="numpy")
inner = numba.njit(error_model="numpy")

# The grid being tried, q = round((x + shift) * inverse), and sums it leads to; sums of 1, x and x * x; the lowest
# weight (for Q6_K the one of largest magnitude) and the range; what the search for grids found; steps and scales of the
# round at hand, before and after nudging; the least error so far; the best round.
LANE_FIELDS = """shift inverse slope first second third
    sum_w sum_x sum_xx low span best_slope best_floor
    step floor_step scale minimum ideal tried_scale tried_minimum nudged_scale nudged_minimum
    least total best_step best_floor_step best_scale best_minimum""".split()


def kernel(function: Callable[..., None]) -> Any:
    """What Python calls: runs without the interpreter's lock, and is cached on disk with all that it calls."""
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # Numba finds no folder that it may write: every process compiles anew
        return numba.njit(nogil=True, error_model="numpy")(function)


@functools.cache
def new_tile_type(subs: int, weights: int) -> np.dtype[np.void]:
    """A tile as one record, so that the compiler sees that no two of its arrays overlap.

    Weights and importance are (weights of a sub-block * lanes,), the rest (lanes,); what belongs to a block stands
    there once for each of its sub-blocks. Numba looks for machine code on disk by the types of arguments, and compares
    the date of one file only: so the type's last field is named after all that the code was made from.
    """
    lanes = subs * TILE_LANES
    return np.dtype(
        [(name, np.float32, weights * lanes) for name in ("x", "w")]
        + [(name, np.float32, lanes) for name in LANE_FIELDS]
        + [(f"made_from_{_fingerprint()}", np.uint8)]
    )


def _fingerprint() -> str:
    folder = Path(__file__).resolve().parent
    sources = [folder.parent / "k_search.py", *sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


@inline
def ratio(above: Any, below: Any) -> Any:
    usable = abs(below) >= SMALLEST_SPREAD
    quotient = above / (below if usable else ONE)
    return quotient if usable else ZERO


@inline
def whole(value: Any, lowest: Any, highest: Any) -> Any:
    """Bounded and rounded, halves to even: torch rounds first, which between whole bounds is the same."""
    value = value if value > lowest else lowest
    value = value if value < highest else highest
    return np.rint(value)


@inline
def round_to_half(value: Any) -> Any:
    magnitude = min(abs(value), LARGEST)
    if magnitude < SUBNORMAL_END:
        half = (magnitude + SUBNORMAL_ROUNDER) - SUBNORMAL_ROUNDER
    else:  # 13 of float32's 23 bits fall away
        bits = np.float32(magnitude).view(np.int32)
        half = np.int32((bits + 4095 + ((bits >> 13) & 1)) & ~8191).view(np.float32)
    return (half if value >= ZERO else -half) + ZERO


@inline
def round_up_to_half(value: Any) -> Any:
    magnitude = min(abs(value), LARGEST)
    half = round_to_half(magnitude)
    if half < magnitude:
        if magnitude < SUBNORMAL_END:
            half = half + SUBNORMAL_UNIT
        else:
            half = np.int32(np.float32(half).view(np.int32) + 8192).view(np.float32)
    return (half if value >= ZERO else -half) + ZERO


@inline
def _plus(one: Three, other: Three) -> Three:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


@inline
def fold_8(term: Callable[..., Three], tile: Any, at: int, apart: int, p: Any) -> Three:
    """`k_search.fold` of eight terms that stand `apart`; a term is three numbers that are summed side by side."""
    even = _plus(
        _plus(term(tile, at, p), term(tile, at + 4 * apart, p)),
        _plus(term(tile, at + 2 * apart, p), term(tile, at + 6 * apart, p)),
    )
    odd = _plus(
        _plus(term(tile, at + apart, p), term(tile, at + 5 * apart, p)),
        _plus(term(tile, at + 3 * apart, p), term(tile, at + 7 * apart, p)),
    )
    return _plus(even, odd)


@inline
def fold_16(term: Callable[..., Three], tile: Any, at: int, apart: int, p: Any) -> Three:
    return _plus(fold_8(term, tile, at, 2 * apart, p), fold_8(term, tile, at + apart, 2 * apart, p))


@inline
def fold_32(term: Callable[..., Three], tile: Any, at: int, apart: int, p: Any) -> Three:
    return _plus(fold_16(term, tile, at, 2 * apart, p), fold_16(term, tile, at + apart, 2 * apart, p))


@inline
def total_terms(tile: Any, at: int, p: Any) -> Three:
    weighed = tile.x[at] * tile.w[at]
    return tile.w[at], weighed, weighed * tile.x[at]


@inline
def moment_terms(tile: Any, at: int, p: Any) -> Three:
    shift, inverse, lowest, highest, _ = p
    q = whole((tile.x[at] + shift) * inverse, lowest, highest)
    weighed = q * tile.w[at]
    return weighed, weighed * q, weighed * tile.x[at]


@inline
def error_terms(tile: Any, at: int, p: Any) -> Three:
    floor, inverse, lowest, highest, slope = p
    wrong = whole((tile.x[at] + floor) * inverse, lowest, highest) * slope - floor - tile.x[at]
    return wrong * wrong * tile.w[at], ZERO, ZERO


def over_sub_blocks(fold: Callable[..., Three], terms: Callable[..., Three], lanes: int) -> Any:
    """A loop that leaves in `first`, `second` and `third` of every lane the sums of these terms over its sub-block."""

    @inner
    def sums(tile, lowest, highest):  # type: ignore[no-untyped-def]
        for lane in range(lanes):
            grid = (tile.shift[lane], tile.inverse[lane], lowest, highest, tile.slope[lane])
            tile.first[lane], tile.second[lane], tile.third[lane] = fold(terms, tile, lane, lanes, grid)

    return sums


@inline
def least_terms(tile: Any, lane: int, p: Any) -> Three:
    return tile.least[lane], ZERO, ZERO


@inner
def quantize(tile, subs, weights, lowest, highest):  # type: ignore[no-untyped-def]
    """Weights become quants, in place."""
    lanes = subs * TILE_LANES
    for k in range(weights):
        for lane in range(lanes):
            value = tile.x[k * lanes + lane]
            tile.x[k * lanes + lane] = whole((value + tile.shift[lane]) * tile.inverse[lane], lowest, highest)


@inner
def load(tile, blocks, importance, first, subs, weights):  # type: ignore[no-untyped-def]
    """Lay eight blocks out in lanes; past the last block stand zeros."""
    for block in range(TILE_LANES):
        inside = first + block < len(blocks)
        row = first + block if inside else 0
        weighing = row % len(importance)
        for sub in range(subs):
            for k in range(weights):
                at = (k * subs + sub) * TILE_LANES + block
                tile.x[at] = blocks[row, sub * weights + k] if inside else ZERO
                tile.w[at] = importance[weighing, sub * weights + k]
