"""Random weights in every storage format, made on the device at the speed of memory, valid as if encoded.

A few rows of Gaussian noise go through the real encoder of a storage and are repeated down the matrix. So every scale,
block and float8 is one that the encoder makes, outputs stay finite and of ordinary size, and 9.3 billion weights take
as long as writing them. Rows repeat, which no kernel looks at; memory is distinct, so caches gain nothing.

`RandomBranch` is what a backbone can be assembled from in place of a prepared file. Left out: weights that draw
anything.
"""

from __future__ import annotations

import zlib
from math import ceil

import torch
from torch import Tensor

from ideogram_app.catalog.models import Branch
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.text_encoder import block_type
from ideogram_app.checkpoints.prepared.packed_file import PackedWeight
from ideogram_app.checkpoints.prepared.storage import held_as, held_packed, held_shapes
from ideogram_app.quantization import fp8, int8, k_quants, nf4
from ideogram_app.quantization.rotation import rotate

TILE_ROWS = 64  # that are drawn and encoded; Q4_K's search does 53248 columns of them in under a second


class Tiles:
    """Encoded rows of noise, drawn once for each storage and width, repeated at every use.

    They depend on names and widths alone, not on the order of the calls or the device: two ways to run a model get the
    same one.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._noise: dict[int, Tensor] = {}
        self._encoded: dict[tuple[str, int], tuple[Tensor, ...]] = {}

    def dense(self, shape: tuple[int, ...], name: str = "") -> Tensor:
        """A tensor of the computing type: matrices let a signal through, norms are near one, biases near zero."""
        if len(shape) == 1:
            centre = 1.0 if "norm" in name else 0.0
            drawn = centre + 0.1 * torch.randn(shape, generator=_seeded(name))
            return drawn.to(self.device, self.dtype)
        return _repeated(self._rows(shape[1]).to(self.dtype), shape[0])

    def packed(self, storage: str, rows: int, columns: int, gguf_type: str = "") -> PackedWeight:
        """A packed matrix: fp8, int8, convrot or gguf."""
        key = (f"{storage} {gguf_type}", columns)
        if key not in self._encoded:
            noise = self._rows(columns)
            if storage == "gguf":
                self._encoded[key] = (k_quants.encode(noise, gguf_type),)
            elif storage == "fp8":
                self._encoded[key] = fp8.quantize_rows(noise)
            else:
                self._encoded[key] = int8.quantize_rows(rotate(noise) if storage == "convrot" else noise)
        values, *scale = (_repeated(part, rows) for part in self._encoded[key])
        return PackedWeight(storage, values, scale[0] if scale else None, gguf_type, rotated=storage == "convrot")

    def nf4(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """A matrix in NF4: uint8 (weights / 2,) and one float32 for each of its blocks."""
        key = ("nf4", columns)
        if key not in self._encoded:
            packed, absmax = nf4.encode(self._rows(columns).cpu())
            self._encoded[key] = packed.to(self.device), absmax.to(self.device)
        share = rows / TILE_ROWS
        packed, absmax = self._encoded[key]
        return _repeated(packed, round(share * len(packed))), _repeated(absmax, ceil(rows * columns / nf4.BLOCK))

    def _rows(self, columns: int) -> Tensor:
        """float32 (TILE_ROWS, columns) of variance 1 / columns."""
        if columns not in self._noise:
            drawn = torch.randn(TILE_ROWS, columns, generator=_seeded(str(columns))) / columns**0.5
            self._noise[columns] = drawn.to(self.device)
        return self._noise[columns]


class RandomBranch:
    """A branch of a recipe without a file: an `assemble.BranchWeights` of noise."""

    def __init__(self, branch: Branch, recipe: Recipe, tiles: Tiles) -> None:
        self.recipe, self.tiles = recipe, tiles
        self.packed, self._held = held_packed(recipe, branch), held_shapes(recipe, branch)

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor that is not packed, or some of its rows."""
        height, *rest = self._held[name]
        return self.tiles.dense((height if rows is None else rows.stop - rows.start, *rest), name)

    def stored(self, linear: str) -> tuple[Tensor | PackedWeight, ...]:
        """The weight of a Linear as it is stored."""
        return tuple(map(self._one, held_as(self.recipe, linear)))

    def _one(self, held: str) -> Tensor | PackedWeight:
        if held not in self.packed:
            return self.tensor(f"{held}.weight")
        rows, columns = self._held[f"{held}.weight"]
        kind = block_type(self.recipe, held, columns) if self.recipe.storage == "gguf" else ""
        return self.tiles.packed(self.recipe.storage, rows, columns, kind)


def _seeded(text: str) -> torch.Generator:  # of the CPU, so that every device gets the same numbers
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def _repeated(tile: Tensor, rows: int) -> Tensor:
    """The first so many rows of a tile repeated without end, in memory of their own."""
    whole = tile.view(torch.uint8) if tile.dtype == torch.float8_e4m3fn else tile
    times = ceil(rows / len(tile))
    made = whole.repeat(times, *(1 for _ in whole.shape[1:]))[:rows]
    return made.clone().view(tile.dtype) if times * len(tile) != rows else made.view(tile.dtype)
