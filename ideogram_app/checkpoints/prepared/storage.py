"""What a recipe's files hold: the half that writes and the half that reads, side by side.

    storage  file of a branch                                        a packed Linear x
    dense    <branch>/diffusion_pytorch_model.safetensors            x.weight
    fp8      the same                                                x.weight (float8), x.weight_scale (rows,)
    int8     the same, as torchao and diffusers save it              x._weight_qdata (int8), x._weight_scale (rows, 1)
    convrot  <model>[_uncond]-int8_convrot.safetensors               x.weight (int8, rotated), x.weight_scale (rows, 1),
                                                                     x.comfy_quant (JSON), as ComfyUI reads it
    gguf     <model>[_uncond]-<type>.gguf                            x.weight

The last two have the official names, in which q, k and v are one matrix `attention.qkv`; the others have diffusers', in
which they are three. Either is asked for by the official names (tensor_names.py). Everything that is not packed keeps
the source's type; GGUF holds it as F32, where bfloat16 loses nothing. Beside every branch's weights stands its
config.json; the one of int8 lets an unmodified `from_pretrained` load the folder.

Every packing here works row by row, so a matrix may be packed, written and read back in runs of rows: the bytes are
those of the whole. `recipe` is always the effective one, whose protected list is the one the files were made with
(`Manifest.effective`). Where the bytes lie is decided in file_plan.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ideogram_app.catalog.models import Component
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.sources import BRANCHES
from ideogram_app.catalog.text_encoder import block_type
from ideogram_app.checkpoints.gguf import GgufFile
from ideogram_app.checkpoints.gguf import GgufTensor as GgufInfo
from ideogram_app.checkpoints.prepared.file_plan import FilePlan, Unit, plan_gguf, plan_safetensors, torchao_metadata
from ideogram_app.checkpoints.published.tensor_names import (
    diffusers_names,
    official_place,
    official_shapes,
    rows_of_parts,
)
from ideogram_app.checkpoints.safetensors import DTYPE_NAMES, DTYPES, SafetensorsFile, SafetensorsTensor
from ideogram_app.checkpoints.span import Reader, Span
from ideogram_app.errors import CheckpointError
from ideogram_app.quantization import fp8, int8, k_quants, rotation
from ideogram_app.quantization.rows import dequantize_rows

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # the name diffusers looks for
FUSING = ("gguf", "convrot")  # storages with the official names
# How ComfyUI and stable-diffusion.cpp recognise such a Linear.
COMFY_QUANT = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": rotation.GROUP}
COMFY_BYTES = json.dumps(COMFY_QUANT, separators=(",", ":")).encode()


@dataclass(frozen=True)
class PackedWeight:
    """A Linear's weight as it rests: `values` and, by storage, the `scale` of each row (rows,) or the block type.

    Attributes:
        rotated: whether the columns were rotated before they were rounded, so that inputs must be too.
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
        """The same on a device."""
        scale = None if self.scale is None else self.scale.to(device)
        return PackedWeight(self.storage, self.values.to(device), scale, self.gguf_type, self.rotated)

    def chunk(self, count: int) -> tuple[PackedWeight, ...]:
        """Equal parts of its rows, the first on top: views, as of `Tensor.chunk`."""
        values = self.values.chunk(count)
        scales = [None] * count if self.scale is None else self.scale.chunk(count)
        return tuple(replace(self, values=value, scale=scale) for value, scale in zip(values, scales, strict=True))


def branch_file(model: str, recipe: Recipe, branch_name: str) -> str:
    """Where a branch's weights lie inside a prepared folder."""
    if recipe.storage not in FUSING:
        return f"{branch_name}/{WEIGHTS_FILE}"
    stem = f"{model}{'' if branch_name == BRANCHES[0] else '_uncond'}"
    return f"{stem}-{recipe.gguf_type}.gguf" if recipe.storage == "gguf" else f"{stem}-int8_convrot.safetensors"


def packed_layers(recipe: Recipe, component: Component) -> set[str]:
    """The Linears whose weights are packed, by diffusers' names: where q, k and v are one matrix, all three or none."""
    packed = {linear.name for linear in component.linears() if recipe.packs(linear.name)}
    if recipe.storage in FUSING:
        packed = {name for name in packed if packed.issuperset(diffusers_names(official_place(name)[0]))}
    return packed


def held_as(recipe: Recipe, official: str) -> tuple[str, ...]:
    """Under which names a recipe's files hold a tensor or Linear: one, or those of its rows, the first on top."""
    return (official,) if recipe.storage in FUSING else diffusers_names(official)


def held_shapes(recipe: Recipe, component: Component) -> dict[str, tuple[int, ...]]:
    """Every tensor by the name under which a recipe's files hold it, in their order."""
    return official_shapes(component.shapes()) if recipe.storage in FUSING else component.shapes()


def held_packed(recipe: Recipe, component: Component) -> set[str]:
    """The Linears whose weights are packed, by the names under which a recipe's files hold them."""
    packed = packed_layers(recipe, component)
    return {official_place(name)[0] for name in packed} if recipe.storage in FUSING else packed


def units(recipe: Recipe, component: Component, dtypes: Mapping[str, torch.dtype]) -> list[Unit]:
    """Everything a file will hold; `dtypes` are those of tensors that are not packed."""
    packed = held_packed(recipe, component)
    made = []
    for name, shape in held_shapes(recipe, component).items():
        source, part = official_place(name)
        is_packed = name.removesuffix(".weight") in packed
        parts = _packed_parts(recipe, name, shape) if is_packed else (_dense_part(recipe, name, shape, dtypes[source]),)
        made.append(Unit(name, source, part * shape[0], parts, is_packed, by_rows=min(2, len(parts))))
    return made


def pack(recipe: Recipe, unit: Unit, weight: Tensor, importance: Tensor | None = None) -> list[Tensor]:
    """What rows of a unit become: rows of each of its first `by_rows` parts.

    Args:
        weight: (rows, columns), or (rows,) for what is not packed.
        importance: (columns,) of GGUF's search, where statistics of the inputs are known.
    """
    if not unit.packed:
        part = unit.parts[0]
        return [weight.float() if isinstance(part, GgufInfo) else weight.to(DTYPES[part.dtype])]
    if recipe.rotated:
        weight = rotation.rotate(weight)
    if recipe.storage == "gguf":
        return [k_quants.encode(weight, _kind(unit.parts[0]), importance)]
    if recipe.storage == "fp8":
        return list(fp8.quantize_rows(weight))
    values, scale = int8.quantize_rows(weight)
    return [values, scale.unsqueeze(-1)]


def constants(unit: Unit) -> dict[str, Tensor]:
    """The parts of a unit that do not depend on weights."""
    return {part.name: torch.tensor(list(COMFY_BYTES), dtype=torch.uint8) for part in unit.parts[unit.by_rows :]}


def plan_file(recipe: Recipe, made: Sequence[Unit], dtype: torch.dtype) -> FilePlan:
    """The file that `made` will fill; `dtype` is that of dense layers, which torchao's metadata records."""
    if recipe.storage == "gguf":
        return plan_gguf(made)
    if recipe.storage == "int8" and recipe.quantizes_activations:
        return plan_safetensors(made, torchao_metadata(made, dtype))
    # ComfyUI's int8_convrot files say nothing of themselves.
    return plan_safetensors(made, {} if recipe.storage == "convrot" else {"format": "pt"})


def branch_config(recipe: Recipe, component: Component, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a prepared branch: the source's, and for int8 how diffusers has to read the weights."""
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config")}
    if recipe.storage == "int8" and recipe.quantizes_activations:
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        protected = [linear.name for linear in component.linears() if not recipe.packs(linear.name)]
        settings = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=protected)
        kept["quantization_config"] = settings.to_dict()
    return kept


class PackedBranch:
    """One prepared file: dense tensors and packed weights by their official names, read on demand and by rows.

    Attributes:
        packed: the Linears whose weights are packed, by the names under which the file holds them.
        reader: how a span of the file becomes a tensor.

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
        return _stacked([self._rows(part, part, cut) for part, cut in self._cut(name, rows)])

    def values(self, name: str, rows: slice | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A tensor as it counts, on a device: float32 and rotated back where it is packed, else as it is stored."""
        found = []
        for part, cut in self._cut(name, rows):
            linear = part.removesuffix(".weight")
            if linear in self.packed and linear != part:
                found.append(self.weight(linear, cut).to(device).decoded())
            else:
                found.append(self._rows(part, part, cut).to(device))
        return _stacked(found)

    def weight(self, linear: str, rows: slice | None = None) -> PackedWeight:
        """A packed weight by the name under which the file holds it, or some of its rows."""
        name, recipe = f"{linear}.weight", self.recipe
        stored = _packed_parts(recipe, name, self._held[name])
        values = self._rows(stored[0].name, name, rows)
        if recipe.storage == "gguf":
            return PackedWeight("gguf", values, gguf_type=_kind(stored[0]), rotated=recipe.rotated)
        scale = self._rows(stored[1].name, name, rows).reshape(-1)
        return PackedWeight(recipe.storage, values, scale, rotated=recipe.rotated)

    def stored(self, linear: str) -> tuple[Tensor | PackedWeight, ...]:
        """The weight of a Linear as it rests: one, or its rows from top to bottom where the file holds them apart."""
        return tuple(
            self.weight(part) if part in self.packed else self._rows(f"{part}.weight", f"{part}.weight", None)
            for part in held_as(self.recipe, linear)
        )

    def weight_spans(self, linear: str) -> list[Span]:
        """Where the numbers of a Linear's weight lie, without their scales: one run, or one for each part of it."""
        found = []
        for part in held_as(self.recipe, linear):
            name = f"{part}.weight"
            stored = _packed_parts(self.recipe, name, self._held[name])[0].name if part in self.packed else name
            found.append(self._span(stored, name))
        return found

    def linears_within(self, start: str) -> list[str]:
        """Names of the Linears whose name starts like this, packed or not."""
        weights = (name for name, shape in self._shapes.items() if name.startswith(start) and len(shape) == 2)
        return [name.removesuffix(".weight") for name in weights]

    def read_with(self, reader: Reader) -> PackedBranch:
        """The same file, read in another way."""
        other = copy(self)
        other.reader = reader
        return other

    def spans(self, name: str) -> list[Span]:
        """What `tensor` reads of a tensor, or `stored` of a Linear: of each part its values, then its scales."""
        if f"{name}.weight" not in self._shapes:
            return [self._span(part, part) for part in held_as(self.recipe, name)]
        found = []
        for part in held_as(self.recipe, name):
            weight = f"{part}.weight"
            stored = _packed_parts(self.recipe, weight, self._held[weight])[:2] if part in self.packed else ()
            found += [self._span(each.name, weight) for each in stored] or [self._span(weight, weight)]
        return found

    def _span(self, stored: str, name: str, rows: slice | None = None) -> Span:
        """Rows of a tensor in the file that belongs to the held one of this name."""
        return self._file.span(stored, rows or slice(0, self._held[name][0]))

    def _cut(self, name: str, rows: slice | None) -> list[tuple[str, slice]]:
        """Which rows of which held tensors are these rows of an official one."""
        parts, height = held_as(self.recipe, name), self._shapes[name][0]
        asked = rows or slice(0, height)
        return [(parts[index], cut) for index, cut in rows_of_parts(asked, height // len(parts), len(parts))]

    def _rows(self, stored: str, name: str, rows: slice | None) -> Tensor:
        """Those rows, in memory of their own."""
        return self.reader(self._span(stored, name, rows))

    def _check(self, component: Component) -> None:
        infos: Mapping[str, SafetensorsTensor | GgufInfo] = self._file.infos
        any_float = dict.fromkeys(self._shapes, torch.float32)  # packed parts have one type, the rest any float
        expected = {part.name: (part, unit) for unit in units(self.recipe, component, any_float) for part in unit.parts}
        strange = [name for name in infos if name not in expected]
        if strange:
            raise CheckpointError(f"{self.path} holds {len(strange)} unknown tensors", got=f"first {strange[0]}")
        for name, (part, unit) in expected.items():
            info = infos.get(name)
            if info is None:
                raise CheckpointError(f"{self.path} lacks a tensor", expected=f"{name} {part.shape}")
            if info.shape != part.shape or (unit.packed and _kind(info) != _kind(part)):
                raise CheckpointError(
                    f"Tensor {name} of {self.path} is not what {self.recipe.name} asks for",
                    expected=f"{_kind(part)} {part.shape}",
                    got=f"{_kind(info)} {info.shape}",
                )


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _kind(info: SafetensorsTensor | GgufInfo) -> str:
    return info.gguf_type if isinstance(info, GgufInfo) else info.dtype


def _dense_part(recipe: Recipe, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> SafetensorsTensor | GgufInfo:
    return (
        GgufInfo(name, shape, "F32") if recipe.storage == "gguf" else SafetensorsTensor(name, DTYPE_NAMES[dtype], shape)
    )


def _packed_parts(recipe: Recipe, name: str, shape: tuple[int, ...]) -> tuple[SafetensorsTensor | GgufInfo, ...]:
    """Values, then scales where they lie apart, then what says how to read them."""
    column = (shape[0], 1)
    if recipe.storage == "gguf":
        return (GgufInfo(name, shape, block_type(recipe, name.removesuffix(".weight"), shape[1])),)
    if recipe.storage == "fp8":
        return SafetensorsTensor(name, "F8_E4M3", shape), SafetensorsTensor(f"{name}_scale", "F32", shape[:1])
    if recipe.storage == "convrot":
        mark = SafetensorsTensor(f"{name.removesuffix('weight')}comfy_quant", "U8", (len(COMFY_BYTES),))
        return SafetensorsTensor(name, "I8", shape), SafetensorsTensor(f"{name}_scale", "F32", column), mark
    stem = name.removesuffix("weight") + "_weight"
    return SafetensorsTensor(f"{stem}_qdata", "I8", shape), SafetensorsTensor(f"{stem}_scale", "F32", column)
