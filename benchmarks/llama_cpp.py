"""llama.cpp's search for Q4_K, in NumPy, written from its description: the bar that our encoder is measured against.

For every 32 weights: importance sqrt(mean x^2) + |x|; 21 candidate grids, each rounded and fitted by weighted least
squares with a minimum that is not above zero; the one of least weighted error stays. Then scales and minima are rounded
to 6 bits against the largest of their block of 256, and all weights are rounded again with what came out.

Gives the weights as a reader would decode them. Left out: packing into bytes, which loses nothing more.
"""

from __future__ import annotations

import numpy as np

LEVELS, SIX_BITS = 15.0, 63.0
CANDIDATES = [-1.0 + 0.1 * step for step in range(21)]  # levels more than the format has
Array = np.ndarray


def q4_k(weight: Array) -> Array:
    """(rows, columns) float32 -> the same after Q4_K; columns are a multiple of 256."""
    x = weight.astype(np.float32).reshape(-1, 8, 32)
    slopes, floors = _search(x)  # (blocks, 8) each
    step = _half(slopes.max(-1, keepdims=True) / SIX_BITS)
    floor_step = _half(floors.max(-1, keepdims=True) / SIX_BITS)
    sixths = (_whole(_ratio(SIX_BITS * part, part.max(-1, keepdims=True)), SIX_BITS) for part in (slopes, floors))
    scale, floor = (part[..., None] * whole[..., None] for part, whole in zip((step, floor_step), sixths, strict=True))
    quants = _whole(_ratio(x + floor, scale), LEVELS)
    return (scale * quants - floor).reshape(weight.shape).astype(np.float32)


def _search(x: Array) -> tuple[Array, Array]:
    """Slope and floor of the best grid `slope * q - floor` of every 32 weights."""
    w = np.sqrt((x * x).mean(-1, keepdims=True)) + np.abs(x)
    low = np.minimum(x.min(-1, keepdims=True), 0)
    span = x.max(-1, keepdims=True) - low
    sum_w, sum_x = w.sum(-1), (w * x).sum(-1)
    slope, least = (span / LEVELS)[..., 0], np.full(x.shape[:-1], np.inf)
    offset = low[..., 0]
    for index, extra in enumerate([0.0, *CANDIDATES]):
        q = _whole(_ratio(LEVELS + extra, span) * (x - low), LEVELS)
        a, b = _fit(w, x, q, sum_w, sum_x) if index else (slope, offset)
        error = (w * (a[..., None] * q + b[..., None] - x) ** 2).sum(-1)
        better = error < least
        least = np.where(better, error, least)
        slope, offset = np.where(better, a, slope), np.where(better, b, offset)
    return slope, -offset


def _fit(w: Array, x: Array, q: Array, sum_w: Array, sum_x: Array) -> tuple[Array, Array]:
    """Weighted least squares for x = a * q + b with b <= 0."""
    sum_q, sum_qq, sum_qx = (w * q).sum(-1), (w * q * q).sum(-1), (w * q * x).sum(-1)
    determinant = sum_w * sum_qq - sum_q * sum_q
    a = _ratio(sum_w * sum_qx - sum_x * sum_q, determinant)
    b = _ratio(sum_qq * sum_x - sum_q * sum_qx, determinant)
    return np.where(b > 0, _ratio(sum_qx, sum_qq), a), np.minimum(b, 0)


def _whole(values: Array, highest: float) -> Array:
    return np.clip(np.rint(values), 0, highest)


def _ratio(above: Array | float, below: Array) -> Array:
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)


def _half(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float32)
