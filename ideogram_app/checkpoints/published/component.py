"""Published checkpoint of one component, transformer or text encoder: tensors checked, then read by rows.

    groups = group_tensors(files, translate)                    official or diffusers' name -> role -> entry in a file
    checkpoint = Checkpoint(folder, files, groups, shapes, what)
    checkpoint.tensor("layers.3.attention.qkv.weight", rows)

Unknown, missing, doubled or wrongly shaped tensors are an error that names file and tensor, before the first is read.
Where a publication has q, k and v apart they become one matrix here, as they are read, and nowhere else. Nothing is
cached. Left out: the expected shapes (transformer.py, text_encoder.py), and dequantizing (codecs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ideogram_app.checkpoints.gguf import GgufFile
from ideogram_app.checkpoints.published.codecs import EncodedTensor, Shape, Shapes, TensorEntry
from ideogram_app.checkpoints.published.layouts import LAYOUTS
from ideogram_app.checkpoints.published.tensor_names import WEIGHT, Name, diffusers_names, rows_of_parts
from ideogram_app.checkpoints.span import joined
from ideogram_app.checkpoints.weight_files import WeightFile
from ideogram_app.errors import CheckpointError

Groups = dict[str, dict[str, TensorEntry]]  # tensor -> role (tensor_names.py) -> entry


class Checkpoint:
    """Tensors by their official names, whatever the layout.

    Args:
        folder, what: for messages: where the tensors come from, and what they are.
        shapes: of all tensors that there must be.
        paired: whether names say which transformer they belong to.

    Attributes:
        layout: a name of `layouts.LAYOUTS`.
        dtypes: name to the type of a tensor that is not packed; bfloat16 for one that is.

    Raises:
        CheckpointError: a tensor is unknown, missing, there twice or of another shape, or packed in a way that is not
            read; the message names file, tensor, expected and got.
    """

    def __init__(
        self, folder: Path, files: list[WeightFile], groups: Groups, shapes: Shapes, what: str, paired: bool = False
    ) -> None:
        self.folder, self.files, self._shapes = folder, files, shapes
        bases = {name: _stored_as(name, groups) for name in shapes}
        _expect_all(folder, groups, bases, shapes, what)
        self._parts = {name: tuple(EncodedTensor(groups[base]) for base in found) for name, found in bases.items()}
        for name, parts in self._parts.items():
            _expect_shape(name, parts, shapes[name])
        self.layout = _recognised([part for parts in self._parts.values() for part in parts], paired)
        self.dtypes: dict[str, torch.dtype] = {
            name: reduce(torch.promote_types, (part.dtype for part in parts)) for name, parts in self._parts.items()
        }

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or some of its rows: float32 for anything that was packed, else as it is stored.

        Raises:
            CheckpointError: no such tensor.
        """
        if name not in self._parts:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        parts, height = self._parts[name], self._shapes[name][0]
        asked = slice(*(rows or slice(None)).indices(height)[:2])
        cuts = rows_of_parts(asked, height // len(parts), len(parts))
        return joined([parts[index].read(cut) for index, cut in cuts])


def group_tensors(files: list[WeightFile], translate: Callable[[WeightFile, str], Name | None]) -> Groups:
    """Every stored tensor, by the one it belongs to and its role; `translate` gives None for one that is not used.

    Raises:
        CheckpointError: one that is there twice.
    """
    found: Groups = {}
    for file in files:
        for stored in file.infos:
            name, entry = translate(file, stored), TensorEntry(file, stored)
            if name is None:
                continue
            other = found.setdefault(name.base, {}).setdefault(name.role, entry)
            if other is not entry:
                raise _twice(name.base, other, entry)
    return found


def _stored_as(name: str, groups: Groups) -> tuple[str, ...]:
    """The stored tensors that hold an official one's rows, from top to bottom: itself, or diffusers' parts."""
    parts = diffusers_names(name)
    apart = [part for part in parts if part in groups and part != name]
    if apart and name in groups:
        raise _twice(apart[0], *(next(iter(groups[base].values())) for base in (name, apart[0])))
    return parts if apart else (name,)


def _twice(name: str, first: TensorEntry, second: TensorEntry) -> CheckpointError:
    places = " and ".join(f"{entry.name} in {entry.file.path}" for entry in (first, second))
    return CheckpointError(f"Tensor {name} is there twice", got=places)


def _expect_all(folder: Path, groups: Groups, bases: Mapping[str, tuple[str, ...]], shapes: Shapes, what: str) -> None:
    """Refuse unknown tensors, missing ones, and scales without their weight."""
    wanted = {base: _part(shapes[name], found) for name, found in bases.items() for base in found}
    unknown = [next(iter(parts.values())) for base, parts in groups.items() if base not in wanted]
    if unknown:
        raise CheckpointError(
            f"{unknown[0].file.path} is of a layout this version does not know",
            expected=f"{what} and nothing else",
            got=f"{len(unknown)} unknown tensors, first {unknown[0]}",
        )
    missing = [f"{base} {shape}" for base, shape in wanted.items() if base not in groups]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors", expected=missing[0], got="not there")
    for base, shape in wanted.items():
        if WEIGHT not in groups[base]:
            first, *others = groups[base].values()
            raise CheckpointError(
                f"{first.file.path} holds {first.name} without its weight",
                expected=f"{base} {shape}",
                got=f"only {', '.join(entry.name for entry in (first, *others))}",
            )


def _expect_shape(name: str, parts: tuple[EncodedTensor, ...], shape: Shape) -> None:
    for part in parts:
        if part.shape != _part(shape, parts):
            raise CheckpointError(
                f"Tensor {part.weight.name} of {part.weight.file.path} (here {name}) has the wrong shape",
                expected=str(_part(shape, parts)),
                got=str(part.shape),
            )


def _recognised(stored: list[EncodedTensor], paired: bool) -> str:
    first = stored[0].weight.file
    container = "gguf" if isinstance(first, GgufFile) else "safetensors"
    packed = {tensor.codec.name for tensor in stored} - {"dense"} or {"dense"}
    noted = any("format" in tensor.settings for tensor in stored)
    for row in LAYOUTS.values():
        same = (row.container, row.noted, row.paired) == (container, noted, paired)
        if same and (not row.codec or {row.codec} == packed):
            return row.name
    beside = (", with notes" if noted else "") + (", both in one file" if paired else "")
    raise CheckpointError(
        f"{first.path} is of a layout this version does not know",
        expected="; ".join(f"{row.name}: {row.about}" for row in LAYOUTS.values()),
        got=f"{container}, {' and '.join(sorted(packed))}{beside}",
    )


def _part(shape: Shape, parts: tuple[object, ...]) -> Shape:
    """Of each of these parts, which hold equal rows of a tensor of this shape."""
    return (shape[0] // len(parts), *shape[1:])
