"""Packed files read: dense tensors and packed weights by official names, whole or by rows.

    file = PackedFile(path, recipe, component)          checked against the recipe, tensor by tensor
    file.tensor(name, rows)                             a dense tensor
    file.stored("layers.3.attention.qkv")               the weight of a Linear as it is stored: `PackedWeight`s
    file.read_with(reader)                              the same file, read through a prefetching reader

The writing half and the names in the files stand in storage.py; prepare/ writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ideogram_app.catalog.models import Component
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.text_encoder import TextEncoder, find_encoder_recipe
from ideogram_app.checkpoints.gguf import GgufFile
from ideogram_app.checkpoints.prepared.storage import (
    ENCODER,
    FileTensor,
    encoder_file,
    held_as,
    held_packed,
    held_shapes,
    packed_parts,
    units,
)
from ideogram_app.checkpoints.published.tensor_names import official_shapes, rows_of_parts
from ideogram_app.checkpoints.safetensors import SafetensorsFile
from ideogram_app.checkpoints.span import Reader, Span, joined
from ideogram_app.checkpoints.weight_files import read_config
from ideogram_app.errors import CheckpointError
from ideogram_app.quantization import k_quants, rotation
from ideogram_app.quantization.fp8_codes import moved
from ideogram_app.quantization.rows import dequantize_rows


@dataclass(frozen=True)
class PackedWeight:
    """A Linear's weight as it is stored: `values` and, by storage, the `scale` of each row (rows,) or the block type.

    Where it is `rotated`, its columns were rotated before they were rounded, and inputs must be rotated too.
    """

    storage: str
    values: Tensor
    scale: Tensor | None = None
    gguf_type: str = ""
    rotated: bool = False

    def decoded(self) -> Tensor:
        """float32 (rows, columns), rotated back."""
        if self.storage == "gguf":
            weight = k_quants.decode(self.values, self.gguf_type)
        else:
            assert self.scale is not None
            weight = dequantize_rows(self.values, self.scale)
        return rotation.rotate(weight) if self.rotated else weight

    def to(self, device: torch.device | str) -> PackedWeight:
        scale = None if self.scale is None else self.scale.to(device)
        return replace(self, values=moved(self.values, device), scale=scale)

    def chunk(self, count: int) -> tuple[PackedWeight, ...]:
        """Equal parts of its rows, from top to bottom: views, as of `Tensor.chunk`."""
        values = self.values.chunk(count)
        scales = [None] * count if self.scale is None else self.scale.chunk(count)
        return tuple(replace(self, values=value, scale=scale) for value, scale in zip(values, scales, strict=True))


class PackedFile:
    """The weights of one transformer or text encoder in a prepared file, read on demand.

    Attributes:
        packed: the Linears whose weights are packed, by the names under which the file holds them.

    Raises:
        CheckpointError: the file is not what the recipe asks for; the message names file, tensor, expected and got.
    """

    def __init__(self, path: Path, recipe: Recipe, component: Component) -> None:
        self.path, self.recipe = path, recipe
        self.packed = held_packed(recipe, component)
        self._shapes, self._held = official_shapes(component.shapes()), held_shapes(recipe, component)
        self._file = GgufFile(path) if recipe.storage == "gguf" else SafetensorsFile(path)
        self.reader: Reader = Span.read
        self._check(component)

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor that is not packed, or some of its rows."""
        return joined([self._rows(part, part, cut) for part, cut in self._cut(name, rows)])

    def values(self, name: str, rows: slice | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A tensor's numbers on a device: float32 and rotated back where it is packed, else as it is stored."""
        found = []
        for part, cut in self._cut(name, rows):
            linear = part.removesuffix(".weight")
            if linear in self.packed and linear != part:
                found.append(self.weight(linear, cut).to(device).decoded())
            else:
                found.append(self._rows(part, part, cut).to(device))
        return joined(found)

    def weight(self, linear: str, rows: slice | None = None) -> PackedWeight:
        """A packed weight by the name under which the file holds it, or some of its rows."""
        name, storage, rotated = f"{linear}.weight", self.recipe.storage, self.recipe.rotated
        values, *scale = (self._rows(stored, name, rows) for stored in self._names(linear))
        if storage == "gguf":
            return PackedWeight(storage, values, gguf_type=self._file.infos[name].dtype, rotated=rotated)
        return PackedWeight(storage, values, scale[0].reshape(-1), rotated=rotated)

    def stored(self, linear: str) -> tuple[Tensor | PackedWeight, ...]:
        """The weight of a Linear as it is stored: one, or its rows from top to bottom where they are apart."""
        return tuple(
            self.weight(part) if part in self.packed else self._rows(f"{part}.weight", f"{part}.weight", None)
            for part in held_as(self.recipe, linear)
        )

    def weight_spans(self, linear: str) -> list[Span]:
        """The spans of a Linear's weight, without its scales: one, or one for each part of it."""
        return [self._span(self._names(part)[0], f"{part}.weight") for part in held_as(self.recipe, linear)]

    def linears_within(self, start: str) -> list[str]:
        weights = (name for name, shape in self._shapes.items() if name.startswith(start) and len(shape) == 2)
        return [name.removesuffix(".weight") for name in weights]

    def read_with(self, reader: Reader) -> PackedFile:
        other = copy(self)
        other.reader = reader
        return other

    def spans(self, name: str) -> list[Span]:
        """The spans that `tensor` reads of a tensor, or `stored` of a Linear: of each part values, then scales."""
        parts = held_as(self.recipe, name)
        if f"{name}.weight" not in self._shapes:
            return [self._span(part, part) for part in parts]
        return [self._span(stored, f"{part}.weight") for part in parts for stored in self._names(part)]

    def _names(self, part: str) -> list[str]:
        """The stored tensors of a Linear's weight: values, then scales where they lie apart."""
        name = f"{part}.weight"
        if part not in self.packed:
            return [name]
        return [stored.name for stored in packed_parts(self.recipe, name, self._held[name])[:2]]

    def _span(self, stored: str, name: str, rows: slice | None = None) -> Span:
        return self._file.span(stored, rows or slice(0, self._held[name][0]))

    def _cut(self, name: str, rows: slice | None) -> list[tuple[str, slice]]:
        """The parts of the file that hold these rows of an official tensor, and which of their rows."""
        parts, height = held_as(self.recipe, name), self._shapes[name][0]
        asked = rows or slice(0, height)
        return [(parts[index], cut) for index, cut in rows_of_parts(asked, height // len(parts), len(parts))]

    def _rows(self, stored: str, name: str, rows: slice | None) -> Tensor:
        return self.reader(self._span(stored, name, rows))

    def _check(self, component: Component) -> None:
        infos: Mapping[str, FileTensor] = self._file.infos
        any_float = dict.fromkeys(self._shapes, torch.float32)  # packed parts have one type, the rest any float
        expected = {part.name: (part, unit) for unit in units(self.recipe, component, any_float) for part in unit.parts}
        strange = [name for name in infos if name not in expected]
        if strange:
            raise CheckpointError(f"{self.path} holds {len(strange)} unknown tensors", got=f"first {strange[0]}")
        for name, (part, unit) in expected.items():
            info = infos.get(name)
            if info is None:
                raise CheckpointError(f"{self.path} lacks a tensor", expected=f"{name} {part.shape}")
            if info.shape != part.shape or (unit.packed and info.dtype != part.dtype):
                raise CheckpointError(
                    f"Tensor {name} of {self.path} is not what {self.recipe.name} asks for",
                    expected=f"{part.dtype} {part.shape}",
                    got=f"{info.dtype} {info.shape}",
                )


def open_encoder(folder: Path, encoder: str) -> tuple[PackedFile, TextEncoder, dict[str, Any]]:
    """The prepared text encoder in a folder of components: its file, its shape and its config.

    Raises:
        RequestError: no such encoder recipe.
        CheckpointError: damaged.
    """
    config = read_config(folder / ENCODER)
    shape = TextEncoder.from_config(config)
    return PackedFile(folder / encoder_file(encoder), find_encoder_recipe(encoder), shape), shape, config
