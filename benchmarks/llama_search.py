"""How llama.cpp chooses the scales of Q4_K, Q5_K and Q6_K without an importance matrix: the baseline of `k_quants.py`.

Written in NumPy from the description of the algorithm, whole arrays at a time, as it stands in llama.cpp since 2023:
every sub-block alone by a weighted search, larger weights counting more; then scales rounded against the block's
largest; then all weights rounded once more. What is returned is decoded weights: the bytes would say the same. Left
out: importance matrices, for which llama.cpp has other searches.
"""

from __future__ import annotations

import numpy as np

# Levels, and the grids tried beside the plain one: (levels + first + step * k) / range, k = 0..count.
AFFINE = {"Q4_K": (15, -1.0, 0.1, 20), "Q5_K": (31, -0.5, 0.1, 15)}
Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def requantize(weight: Array, gguf_type: str) -> Array:
    """What is left of a float32 matrix (rows, columns) after llama.cpp's encoder; columns a multiple of 256."""
    blocks = weight.reshape(-1, 256)
    with np.errstate(divide="ignore", invalid="ignore"):
        made = _symmetric(blocks) if gguf_type == "Q6_K" else _affine(blocks, *AFFINE[gguf_type])
    return made.reshape(weight.shape)


def _ratio(above: Array, below: Array) -> Array:
    return np.where(below != 0, above / below, 0).astype(np.float32)


def _half(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float32)


def _affine(blocks: Array, levels: int, first: float, step: float, count: int) -> Array:
    x = blocks.reshape(-1, 8, 32)
    slopes, floors = _search_affine(x, levels, [first + step * k for k in range(count + 1)])  # (blocks, 8)
    largest_slope, largest_floor = slopes.max(-1, keepdims=True), floors.max(-1, keepdims=True)
    scales = np.clip(np.rint(63 * _ratio(slopes, largest_slope)), 0, 63)
    minima = np.clip(np.rint(63 * _ratio(floors, largest_floor)), 0, 63)
    slope = (_half(largest_slope / 63) * scales)[..., None]
    floor = (_half(largest_floor / 63) * minima)[..., None]
    quants = np.clip(np.rint(_ratio(x + floor, slope)), 0, levels)
    return slope * quants - floor


def _search_affine(x: Array, levels: int, extras: list[float]) -> tuple[Array, Array]:
    """Grids `slope * q - floor` of every sub-block (blocks, 8, 32), by weighted least squares: two of (blocks, 8)."""
    weights = np.sqrt(np.square(x).mean(-1, keepdims=True)) + np.abs(x)
    low, high = np.minimum(x.min(-1), 0), x.max(-1)
    slope, offset = (high - low) / levels, low
    q = np.clip(np.rint(_ratio(x - low[..., None], slope[..., None])), 0, levels)
    least = (weights * np.square(slope[..., None] * q + low[..., None] - x)).sum(-1)
    for extra in extras:
        # The lowest weight of the grid is the best one found so far, and moves with it.
        inverse = _ratio(np.full_like(low, levels + extra), high - offset)[..., None]
        q = np.clip(np.rint((x - offset[..., None]) * inverse), 0, levels)
        sum_w, sum_x = weights.sum(-1), (weights * x).sum(-1)
        sum_q, sum_qq, sum_qx = (weights * q).sum(-1), (weights * q * q).sum(-1), (weights * q * x).sum(-1)
        determinant = sum_w * sum_qq - sum_q * sum_q
        a = _ratio(sum_w * sum_qx - sum_x * sum_q, determinant)
        b = _ratio(sum_qq * sum_x - sum_q * sum_qx, determinant)
        a, b = np.where(b > 0, _ratio(sum_qx, sum_qq), a), np.minimum(b, 0)
        error = (weights * np.square(a[..., None] * q + b[..., None] - x)).sum(-1)
        better = (error < least) & (determinant > 0)
        least, slope, offset = np.where(better, error, least), np.where(better, a, slope), np.where(better, b, offset)
    return slope, -offset


def _symmetric(blocks: Array) -> Array:
    x = blocks.reshape(-1, 16, 16)
    extreme = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)
    weights = x * x
    slope, most = np.zeros(x.shape[:2], np.float32), np.full(x.shape[:2], -1, np.float32)
    for extra in (0, *(k for k in range(-9, 10) if k)):
        q = np.clip(np.rint(x * _ratio(np.full_like(extreme, -(32 + 0.1 * extra)), extreme)), -32, 31)
        sum_qx, sum_qq = (weights * q * x).sum(-1), (weights * q * q).sum(-1)
        explained = _ratio(sum_qx * sum_qx, sum_qq)
        better = explained > most
        most, slope = np.where(better, explained, most), np.where(better, _ratio(sum_qx, sum_qq), slope)
    largest = np.take_along_axis(slope, np.abs(slope).argmax(-1)[..., None], -1)
    scales = np.clip(np.rint(-128 * _ratio(slope, largest)), -128, 127)
    scale = (_half(largest / -128) * scales)[..., None]
    return scale * np.clip(np.rint(_ratio(x, scale)), -32, 31)
