"""Q6_K in lanes: `fit_symmetric` of `k_search.py`, whose names and order of operations these are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ideogram_app.quantization.k_fast.lanes import (
    INFINITY,
    ONE,
    TILE_LANES,
    ZERO,
    Three,
    error_terms,
    fold_16,
    inline,
    inner,
    kernel,
    least_terms,
    load,
    moment_terms,
    over_sub_blocks,
    quantize,
    ratio,
    round_to_half,
    round_up_to_half,
    whole,
)

SUBS, WEIGHTS, LANES = 16, 16, 16 * TILE_LANES
LOWEST_INT8, HIGHEST_INT8, PER_INT8 = np.float32(-128), np.float32(127), np.float32(-(2**-7))

_moments = over_sub_blocks(fold_16, moment_terms, LANES)
_errors = over_sub_blocks(fold_16, error_terms, LANES)


@inner
def _search(tile, lowest, highest, candidates):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        tile.low[lane] = tile.best_slope[lane] = tile.shift[lane] = ZERO
        tile.least[lane] = INFINITY
    for k in range(WEIGHTS):
        for lane in range(LANES):
            value = tile.x[k * LANES + lane]
            tile.low[lane] = value if abs(value) > abs(tile.low[lane]) else tile.low[lane]
    for c in range(len(candidates)):
        for lane in range(LANES):
            tile.inverse[lane] = ratio(candidates[c], tile.low[lane])
        _moments(tile, lowest, highest)
        for lane in range(LANES):
            fitted = ratio(tile.third[lane], tile.second[lane])
            unexplained = -(fitted * tile.third[lane])
            better = unexplained < tile.least[lane]
            tile.least[lane] = unexplained if better else tile.least[lane]
            tile.best_slope[lane] = fitted if better else tile.best_slope[lane]


@inner
def _first_step(tile):  # type: ignore[no-untyped-def]
    for block in range(TILE_LANES):
        largest = tile.best_slope[block]
        for lane in range(block, LANES, TILE_LANES):
            slope = tile.best_slope[lane]
            largest = slope if abs(slope) > abs(largest) else largest
        step = round_up_to_half(largest * PER_INT8)
        for lane in range(block, LANES, TILE_LANES):
            tile.step[lane], tile.total[lane] = step, INFINITY
            tile.scale[lane] = whole(ratio(tile.best_slope[lane], step), LOWEST_INT8, HIGHEST_INT8)


@inner
def _nudge(tile, lowest, highest, reach):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        tile.least[lane], tile.nudged_scale[lane] = INFINITY, tile.scale[lane]
    for up in range(-reach, reach + 1):
        for lane in range(LANES):
            tile.tried_scale[lane] = whole(tile.scale[lane] + np.float32(up), LOWEST_INT8, HIGHEST_INT8)
            tile.slope[lane] = tile.step[lane] * tile.tried_scale[lane]
            tile.inverse[lane] = ratio(ONE, tile.slope[lane])
        _errors(tile, lowest, highest)
        for lane in range(LANES):
            better = tile.first[lane] < tile.least[lane]
            tile.least[lane] = tile.first[lane] if better else tile.least[lane]
            tile.nudged_scale[lane] = tile.tried_scale[lane] if better else tile.nudged_scale[lane]
    for lane in range(LANES):
        tile.scale[lane] = tile.nudged_scale[lane]


@inline
def _step_terms(tile: Any, lane: int, p: Any) -> Three:
    scale = tile.scale[lane]
    return scale * tile.third[lane], scale * scale * tile.second[lane], ZERO


@inner
def _keep_better_and_refit(tile, lowest, highest):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        tile.slope[lane] = tile.step[lane] * tile.scale[lane]
        tile.inverse[lane] = ratio(ONE, tile.slope[lane])
    _moments(tile, lowest, highest)
    for block in range(TILE_LANES):
        total, _, _ = fold_16(least_terms, tile, block, TILE_LANES, ZERO)
        better = total < tile.total[block]
        above, below, _ = fold_16(_step_terms, tile, block, TILE_LANES, ZERO)
        step = round_to_half(ratio(above, below))
        for lane in range(block, LANES, TILE_LANES):
            if better:
                tile.total[lane] = total
                tile.best_step[lane], tile.best_scale[lane] = tile.step[lane], tile.scale[lane]
            tile.step[lane] = step


@kernel
def fit_tiles(tiles, blocks, importance, half_range, reaches, candidates, steps, scales, quants):  # type: ignore[no-untyped-def]
    tile = tiles[0]
    lowest, highest = -half_range, half_range - ONE
    for first in range(0, len(blocks), TILE_LANES):
        load(tile, blocks, importance, first, SUBS, WEIGHTS)
        _search(tile, lowest, highest, candidates)
        _first_step(tile)
        for reach in reaches:
            _nudge(tile, lowest, highest, reach)
            _keep_better_and_refit(tile, lowest, highest)
        for lane in range(LANES):
            tile.inverse[lane] = ratio(ONE, tile.best_step[lane] * tile.best_scale[lane])
        quantize(tile, SUBS, WEIGHTS, lowest, highest)
        for block in range(min(TILE_LANES, len(blocks) - first)):
            steps[first + block, 0] = tile.best_step[block]
            for sub in range(SUBS):
                lane = sub * TILE_LANES + block
                scales[first + block, sub] = np.int8(tile.best_scale[lane])
                for k in range(WEIGHTS):
                    quants[first + block, sub, k] = np.int8(tile.x[k * LANES + lane])
