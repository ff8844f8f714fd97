"""Q4_K and Q5_K in lanes: `fit_affine` of `k_search.py`, whose names and order of operations these are."""

from __future__ import annotations

from typing import Any

import numpy as np

from ideogram_app.quantization.k_fast.lanes import (
    INFINITY,
    ONE,
    TILE_LANES,
    TWO,
    ZERO,
    Three,
    error_terms,
    fold_8,
    fold_32,
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
    total_terms,
    whole,
)
from ideogram_app.quantization.k_search import LARGEST_6_BITS, LEAST_JOINT_SPREAD, LEAST_SPREAD, SIXTY_THIRD

SUBS, WEIGHTS, LANES = 8, 32, 8 * TILE_LANES
SPREAD, JOINT_SPREAD = np.float32(LEAST_SPREAD), np.float32(LEAST_JOINT_SPREAD)
SIX_BITS, PER_SIX_BITS = np.float32(LARGEST_6_BITS), np.float32(SIXTY_THIRD)

_totals = over_sub_blocks(fold_32, total_terms, LANES)
_moments = over_sub_blocks(fold_32, moment_terms, LANES)
_errors = over_sub_blocks(fold_32, error_terms, LANES)


@inline
def _try(tile: Any, lane: int, scale: Any, minimum: Any) -> None:
    """Set the grid that a scale and a minimum make."""
    tile.slope[lane] = tile.step[lane] * scale
    tile.inverse[lane] = ratio(ONE, tile.slope[lane])
    tile.shift[lane] = tile.floor_step[lane] * minimum


@inner
def _begin(tile):  # type: ignore[no-untyped-def]
    _totals(tile, ZERO, ZERO)
    for lane in range(LANES):
        tile.sum_w[lane], tile.sum_x[lane], tile.sum_xx[lane] = tile.first[lane], tile.second[lane], tile.third[lane]
        tile.low[lane], tile.span[lane] = ZERO, ZERO  # until three lines below, the highest weight
    for k in range(WEIGHTS):
        for lane in range(LANES):
            value = tile.x[k * LANES + lane]
            tile.low[lane] = value if value < tile.low[lane] else tile.low[lane]
            tile.span[lane] = value if value > tile.span[lane] else tile.span[lane]
    for lane in range(LANES):
        tile.span[lane] = tile.span[lane] - tile.low[lane]


@inner
def _search(tile, levels, candidates):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        tile.best_slope[lane] = tile.span[lane] * (ONE / levels)
        tile.best_floor[lane] = tile.shift[lane] = -tile.low[lane]
        tile.least[lane] = INFINITY
    for c in range(len(candidates)):
        for lane in range(LANES):
            tile.inverse[lane] = ratio(candidates[c], tile.span[lane])
        _moments(tile, ZERO, levels)
        for lane in range(LANES):
            sum_w, sum_x, sum_xx = tile.sum_w[lane], tile.sum_x[lane], tile.sum_xx[lane]
            sum_q, sum_qq, sum_qx = tile.first[lane], tile.second[lane], tile.third[lane]
            determinant = sum_w * sum_qq - sum_q * sum_q
            a = ratio(sum_w * sum_qx - sum_x * sum_q, determinant)
            b = ratio(sum_qq * sum_x - sum_q * sum_qx, determinant)
            a = ratio(sum_qx, sum_qq) if b > ZERO else a
            b = b if b < ZERO else ZERO
            error = sum_xx + a * a * sum_qq + sum_w * b * b + TWO * (a * b * sum_q - a * sum_qx - b * sum_x)
            better = (error < tile.least[lane]) & (determinant > SPREAD * sum_w * sum_qq)
            tile.least[lane] = error if better else tile.least[lane]
            tile.best_slope[lane] = a if better else tile.best_slope[lane]
            tile.best_floor[lane] = -b if better else tile.best_floor[lane]


@inner
def _first_steps(tile):  # type: ignore[no-untyped-def]
    for block in range(TILE_LANES):
        slope, floor = tile.best_slope[block], tile.best_floor[block]
        for lane in range(block, LANES, TILE_LANES):
            slope, floor = max(slope, tile.best_slope[lane]), max(floor, tile.best_floor[lane])
        step, floor_step = round_up_to_half(slope * PER_SIX_BITS), round_up_to_half(floor * PER_SIX_BITS)
        for lane in range(block, LANES, TILE_LANES):
            tile.step[lane], tile.floor_step[lane], tile.total[lane] = step, floor_step, INFINITY
            tile.scale[lane] = whole(ratio(tile.best_slope[lane], step), ZERO, SIX_BITS)
            tile.minimum[lane] = whole(ratio(tile.best_floor[lane], floor_step), ZERO, SIX_BITS)


@inner
def _nudge(tile, levels, reach):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        tile.least[lane] = INFINITY
        tile.nudged_scale[lane], tile.nudged_minimum[lane] = tile.scale[lane], tile.minimum[lane]
    for up in range(-reach, reach + 1):
        for lane in range(LANES):
            tile.tried_scale[lane] = whole(tile.scale[lane] + np.float32(up), ZERO, SIX_BITS)
            _try(tile, lane, tile.tried_scale[lane], tile.minimum[lane])
        _moments(tile, ZERO, levels)
        for lane in range(LANES):
            ideal = (tile.slope[lane] * tile.first[lane] - tile.sum_x[lane]) / tile.sum_w[lane]
            tile.ideal[lane] = whole(ratio(ideal, tile.floor_step[lane]), ZERO, SIX_BITS)
        for shift in range(-1, 2):
            for lane in range(LANES):
                tile.tried_minimum[lane] = whole(tile.ideal[lane] + np.float32(shift), ZERO, SIX_BITS)
                _try(tile, lane, tile.tried_scale[lane], tile.tried_minimum[lane])
            _errors(tile, ZERO, levels)
            for lane in range(LANES):
                better = tile.first[lane] < tile.least[lane]
                tile.least[lane] = tile.first[lane] if better else tile.least[lane]
                tile.nudged_scale[lane] = tile.tried_scale[lane] if better else tile.nudged_scale[lane]
                tile.nudged_minimum[lane] = tile.tried_minimum[lane] if better else tile.nudged_minimum[lane]
    for lane in range(LANES):
        tile.scale[lane], tile.minimum[lane] = tile.nudged_scale[lane], tile.nudged_minimum[lane]


@inner
def _keep_better(tile):  # type: ignore[no-untyped-def]
    for block in range(TILE_LANES):
        total, _, _ = fold_8(least_terms, tile, block, TILE_LANES, ZERO)
        if total < tile.total[block]:
            for lane in range(block, LANES, TILE_LANES):
                tile.total[lane] = total
                tile.best_step[lane], tile.best_floor_step[lane] = tile.step[lane], tile.floor_step[lane]
                tile.best_scale[lane], tile.best_minimum[lane] = tile.scale[lane], tile.minimum[lane]


@inline
def _slope_terms(tile: Any, lane: int, p: Any) -> Three:
    scale = tile.scale[lane]
    return scale * scale * tile.second[lane], scale * tile.first[lane] * tile.minimum[lane], scale * tile.third[lane]


@inline
def _floor_terms(tile: Any, lane: int, p: Any) -> Three:
    minimum = tile.minimum[lane]
    return minimum * minimum * tile.sum_w[lane], minimum * tile.sum_x[lane], ZERO


@inner
def _refit(tile, levels):  # type: ignore[no-untyped-def]
    for lane in range(LANES):
        _try(tile, lane, tile.scale[lane], tile.minimum[lane])
    _moments(tile, ZERO, levels)
    for block in range(TILE_LANES):
        qq, qm, qx = fold_8(_slope_terms, tile, block, TILE_LANES, ZERO)
        mm, mx, _ = fold_8(_floor_terms, tile, block, TILE_LANES, ZERO)
        determinant = qq * mm - qm * qm
        step, floor_step = tile.step[block], tile.floor_step[block]
        if determinant > JOINT_SPREAD * qq * mm:
            step = max(ratio(mm * qx - qm * mx, determinant), ZERO)
            floor_step = max(ratio(qm * qx - qq * mx, determinant), ZERO)
        step, floor_step = round_to_half(step), round_to_half(floor_step)
        for lane in range(block, LANES, TILE_LANES):
            tile.step[lane], tile.floor_step[lane] = step, floor_step


@kernel
def fit_tiles(tiles, blocks, importance, levels, reaches, candidates, steps, scales, minima, quants):  # type: ignore[no-untyped-def]
    tile = tiles[0]
    for first in range(0, len(blocks), TILE_LANES):
        load(tile, blocks, importance, first, SUBS, WEIGHTS)
        _begin(tile)
        _search(tile, levels, candidates)
        _first_steps(tile)
        for reach in reaches:
            _nudge(tile, levels, reach)
            _keep_better(tile)
            _refit(tile, levels)
        for lane in range(LANES):
            slope = tile.best_step[lane] * tile.best_scale[lane]
            tile.inverse[lane] = ratio(ONE, slope)
            tile.shift[lane] = tile.best_floor_step[lane] * tile.best_minimum[lane]
        quantize(tile, SUBS, WEIGHTS, ZERO, levels)
        for block in range(min(TILE_LANES, len(blocks) - first)):
            steps[first + block, 0] = tile.best_step[block]
            steps[first + block, 1] = tile.best_floor_step[block]
            for sub in range(SUBS):
                lane = sub * TILE_LANES + block
                scales[first + block, sub] = np.uint8(tile.best_scale[lane])
                minima[first + block, sub] = np.uint8(tile.best_minimum[lane])
                for k in range(WEIGHTS):
                    quants[first + block, sub, k] = np.uint8(tile.x[k * LANES + lane])
