"""The K-quant search for CPUs, compiled by Numba: the fits of `k_search.py` bit for bit, ten times faster.

Whole-tensor operations walk through memory once for every multiplication; here a tile of eight blocks stays in the
first-level cache from its weights to its quants. Names are those of `k_search.py`: read it first.

Nothing is compiled at import. The first call of a fit compiles for some seconds, and Numba caches the machine code
beside its source, or in the user's cache folder where that is read-only (`NUMBA_CACHE_DIR` names another). Compiled
code runs without the interpreter's lock, so that Python's threads share the blocks. (Numba's own pool ends the process
when two threads enter it at once.) Left out: packing into bytes, which is a few cheap torch operations.

Its modules (this list is made by tools/docs.py):

    affine.py     Q4_K and Q5_K in lanes: `fit_affine` of `k_search.py`, whose names and order of operations these are.
    lanes.py      Blocks in the lanes of vector registers, and what Q4_K, Q5_K and Q6_K share there.
    symmetric.py  Q6_K in lanes: `fit_symmetric` of `k_search.py`, whose names and order of operations these are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ideogram_app.quantization.k_fast import affine, symmetric
from ideogram_app.quantization.k_fast.lanes import Array, new_tile_type
from ideogram_app.quantization.k_search import (
    AFFINE_CANDIDATES,
    AFFINE_REACHES,
    SYMMETRIC_CANDIDATES,
    SYMMETRIC_REACHES,
    AffineFit,
    Search,
    SymmetricFit,
)


def fit_affine(x: Tensor, levels: int, importance: Tensor | None = None) -> AffineFit:
    """`k_search.fit_affine` for tensors of a CPU; scales, minima and quants come as uint8."""
    blocks = len(x)
    steps, quants = np.empty((blocks, 2), np.float32), np.empty(x.shape, np.uint8)
    scales, minima = np.empty((2, blocks, affine.SUBS), np.uint8)
    given = (_matrix(x), _weighing(importance), np.float32(levels), np.array(AFFINE_REACHES))
    candidates = np.array([levels + extra for extra in AFFINE_CANDIDATES], np.float32)
    tile = np.zeros(1, new_tile_type(affine.SUBS, affine.WEIGHTS))
    affine.fit_tiles(tile, *given, candidates, steps, scales, minima, quants)
    step, floor_step = torch.from_numpy(steps).split(1, -1)
    return AffineFit(step, floor_step, *(torch.from_numpy(made) for made in (scales, minima, quants)))


def fit_symmetric(x: Tensor, half_range: int, importance: Tensor | None = None) -> SymmetricFit:
    """`k_search.fit_symmetric` for tensors of a CPU; scales and quants come as int8."""
    blocks = len(x)
    steps, quants = np.empty((blocks, 1), np.float32), np.empty(x.shape, np.int8)
    scales = np.empty((blocks, symmetric.SUBS), np.int8)
    given = (_matrix(x), _weighing(importance), np.float32(half_range), np.array(SYMMETRIC_REACHES))
    candidates = np.array([-(half_range + extra) for extra in SYMMETRIC_CANDIDATES], np.float32)
    tile = np.zeros(1, new_tile_type(symmetric.SUBS, symmetric.WEIGHTS))
    symmetric.fit_tiles(tile, *given, candidates, steps, scales, quants)
    return SymmetricFit(*(torch.from_numpy(made) for made in (steps, scales, quants)))


def _matrix(x: Tensor) -> Array:
    """(blocks, 256) without a copy where x is contiguous."""
    return x.detach().reshape(len(x), -1).contiguous().numpy()


def _weighing(importance: Tensor | None) -> Array:
    """A row a block, or one row of ones for all."""
    return np.ones((1, 256), np.float32) if importance is None else _matrix(importance)


NUMBA = Search("numba", True, fit_affine, fit_symmetric)
