"""What a recipe's files hold: the half that writes and the half that reads, side by side.

    storage  file of a branch                                        a packed Linear x
    dense    <branch>/diffusion_pytorch_model.safetensors            x.weight
    fp8      the same                                                x.weight (float8), x.weight_scale (rows,)
    int8     the same, as torchao and diffusers save it              x._weight_qdata (int8), x._weight_scale (rows, 1)
    convrot  <model>[_uncond]-int8_convrot.safetensors               x.weight (int8, rotated), x.weight_scale (rows, 1),
                                                                     x.comfy_quant (JSON), as ComfyUI reads it
    gguf     <model>[_uncond]-<type>.gguf                            x.weight

The last two have the official names, in which q, k and v are one tensor `attention.qkv`. Everything that is not packed
keeps the source's type; GGUF holds it as F32, where bfloat16 loses nothing. Beside every branch's weights stands its
config.json; the one of int8 lets an unmodified `from_pretrained` load the folder.

Every packing here works row by row, so a matrix may be packed, written and read back in runs of rows: the bytes are
those of the whole. `recipe` is always the effective one, whose protected list is the one the files were made with
(`Manifest.effective`). Where the bytes lie is decided in file_plan.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ideogram_app.catalog.models import Component
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.catalog.text_encoder import block_type
from ideogram_app.checkpoints.gguf import GgufFile
from ideogram_app.checkpoints.gguf import GgufTensor as GgufInfo
from ideogram_app.checkpoints.prepared.file_plan import FilePlan, Unit, plan_gguf, plan_safetensors, torchao_metadata
from ideogram_app.checkpoints.published.local import BRANCHES
from ideogram_app.checkpoints.safetensors import DTYPE_NAMES, DTYPES, SafetensorsFile, SafetensorsTensor
from ideogram_app.checkpoints.span import Reader, Span
from ideogram_app.errors import CheckpointError
from ideogram_app.quantization import fp8, int8, k_quants, rotation
from ideogram_app.quantization.k_search import Search

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # the name diffusers looks for
SPLIT, FUSED = ("to_q", "to_k", "to_v"), "qkv"
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
            widen = fp8.dequantize_rows if self.storage == "fp8" else int8.dequantize_rows
            weight = widen(self.values, self.scale)
        return rotation.rotate(weight) if self.rotated else weight

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same on a device."""
        scale = None if self.scale is None else self.scale.to(device)
        return PackedWeight(self.storage, self.values.to(device), scale, self.gguf_type, self.rotated)


def branch_file(model: str, recipe: Recipe, branch_name: str) -> str:
    """Where a branch's weights lie inside a prepared folder."""
    if recipe.storage not in FUSING:
        return f"{branch_name}/{WEIGHTS_FILE}"
    stem = f"{model}{'' if branch_name == BRANCHES[0] else '_uncond'}"
    return f"{stem}-{recipe.gguf_type}.gguf" if recipe.storage == "gguf" else f"{stem}-int8_convrot.safetensors"


def packed_layers(recipe: Recipe, component: Component) -> set[str]:
    """The Linears whose weights are packed; where q, k and v are one tensor, one protected part protects all three."""
    packed = {linear.name for linear in component.linears() if recipe.packs(linear.name)}
    if recipe.storage in FUSING:
        packed = {name for name in packed if all(part in packed for part in _siblings(name))}
    return packed


def units(recipe: Recipe, component: Component, dtypes: Mapping[str, torch.dtype]) -> list[Unit]:
    """Everything a file will hold; `dtypes` are those of tensors that are not packed."""
    packed = packed_layers(recipe, component)
    made = []
    for name, shape in component.shapes().items():
        inputs = (name,) if recipe.storage not in FUSING else tuple(_siblings(name))
        if inputs[0] != name:
            continue  # comes with its first sibling
        whole = (len(inputs) * shape[0], *shape[1:])
        if name.removesuffix(".weight") in packed:
            parts = _packed_parts(recipe, name, whole)
            by_rows = min(2, len(parts))
        else:
            parts, by_rows = (_dense_part(recipe, name, whole, dtypes),), 1
        made.append(Unit(inputs, parts, name.removesuffix(".weight") in packed, by_rows))
    return made


def pack(
    recipe: Recipe, unit: Unit, weight: Tensor, importance: Tensor | None = None, search: Search | None = None
) -> list[Tensor]:
    """What rows of one of a unit's inputs become: rows of each of its first `by_rows` parts.

    Args:
        weight: (rows, columns), or (rows,) for what is not packed.
        importance: (columns,) of GGUF's search, where statistics of the inputs are known.
        search: who looks for GGUF's scales; the bytes are the same whoever does.
    """
    if not unit.packed:
        part = unit.parts[0]
        return [weight.float() if isinstance(part, GgufInfo) else weight.to(DTYPES[part.dtype])]
    if recipe.rotated:
        weight = rotation.rotate(weight)
    if recipe.storage == "gguf":
        return [k_quants.encode(weight, _kind(unit.parts[0]), importance, search)]
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
    """One prepared file: dense tensors and packed weights by their own names, read on demand and by rows.

    Attributes:
        reader: how a span of the file becomes a tensor.

    Raises:
        CheckpointError: the file is not what the recipe asks for; the message names file, tensor, expected and got.
    """

    def __init__(self, path: Path, recipe: Recipe, component: Component) -> None:
        self.path, self.recipe = path, recipe
        self.packed = packed_layers(recipe, component)
        self._shapes = component.shapes()
        self._file = GgufFile(path) if recipe.storage == "gguf" else SafetensorsFile(path)
        self.reader: Reader = Span.read
        self._check(component)

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor that is not packed, or some of its rows."""
        return self.reader(self._rows(self._stored(name), name, rows))

    def values(self, name: str, rows: slice | None = None, device: torch.device | str = "cpu") -> Tensor:
        """A tensor as it counts, on a device: float32 and rotated back where it is packed, else as it is stored."""
        linear = name.removesuffix(".weight")
        if linear in self.packed and linear != name:
            return self.weight(linear, rows).to(device).decoded()
        return self.tensor(name, rows).to(device)

    def weight(self, linear: str, rows: slice | None = None) -> PackedWeight:
        """The packed weight of a Linear, or some of its rows."""
        name, recipe = f"{linear}.weight", self.recipe
        values, *scales = (self.reader(span) for span in self.spans(linear, rows))
        if recipe.storage == "gguf":
            kind = _kind(_packed_parts(recipe, name, self._shapes[name])[0])
            return PackedWeight("gguf", values, gguf_type=kind, rotated=recipe.rotated)
        return PackedWeight(recipe.storage, values, scales[0].reshape(-1), rotated=recipe.rotated)

    def stored(self, linear: str, rows: slice | None = None) -> Tensor | PackedWeight:
        """The weight of a Linear as it rests, or some of its rows."""
        return self.weight(linear, rows) if linear in self.packed else self.tensor(f"{linear}.weight", rows)

    def linears_within(self, start: str) -> list[str]:
        """Names of the Linears whose name starts like this, packed or not."""
        weights = (name for name, shape in self._shapes.items() if name.startswith(start) and len(shape) == 2)
        return [name.removesuffix(".weight") for name in weights]

    def read_with(self, reader: Reader) -> PackedBranch:
        """The same file, read in another way."""
        other = copy(self)
        other.reader = reader
        return other

    def spans(self, name: str, rows: slice | None = None) -> list[Span]:
        """What `tensor` reads of a tensor of this name, or `stored` of a Linear: its values, then its scales."""
        whole = f"{name}.weight"
        if name in self.packed:
            parts = _packed_parts(self.recipe, whole, self._shapes[whole])
            return [self._rows(part.name, whole, rows) for part in parts[:2]]
        tensor = whole if whole in self._shapes else name
        return [self._rows(self._stored(tensor), tensor, rows)]

    def weight_spans(self, linear: str) -> list[Span]:
        """Where the numbers of a Linear's weight lie, without their scales."""
        return self.spans(linear)[:1]

    def _rows(self, stored: str, name: str, rows: slice | None) -> Span:
        """Rows of a stored tensor, counted from where those of `name` begin in it."""
        height = self._shapes[name][0]
        first, last = (0, height) if rows is None else (rows.start, rows.stop)
        start = _siblings(name).index(name) * height if self.recipe.storage in FUSING else 0
        return self._file.span(stored, slice(start + first, start + last))

    def _stored(self, name: str) -> str:
        return official(name) if self.recipe.storage in FUSING else name

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


def official(name: str) -> str:
    """The official name of a diffusers tensor."""
    for part in SPLIT:
        name = name.replace(f"attention.{part}.", f"attention.{FUSED}.")
    return name.replace("attention.to_out.0.", "attention.o.")


def _siblings(name: str) -> list[str]:
    """The layers, or tensors, whose rows follow one another in the official one: three for q, k and v, else itself."""
    for part in SPLIT:
        head, found, tail = name.partition(f"attention.{part}")
        if found:
            return [f"{head}attention.{other}{tail}" for other in SPLIT]
    return [name]


def _kind(info: SafetensorsTensor | GgufInfo) -> str:
    return info.gguf_type if isinstance(info, GgufInfo) else info.dtype


def _dense_part(
    recipe: Recipe, name: str, shape: tuple[int, ...], dtypes: Mapping[str, torch.dtype]
) -> SafetensorsTensor | GgufInfo:
    if recipe.storage == "gguf":
        return GgufInfo(official(name), shape, "F32")
    return SafetensorsTensor(official(name) if recipe.storage == "convrot" else name, DTYPE_NAMES[dtypes[name]], shape)


def _packed_parts(recipe: Recipe, name: str, shape: tuple[int, ...]) -> tuple[SafetensorsTensor | GgufInfo, ...]:
    """Values, then scales where they lie apart, then what says how to read them."""
    column = (shape[0], 1)
    if recipe.storage == "gguf":
        return (GgufInfo(official(name), shape, block_type(recipe, name.removesuffix(".weight"), shape[1])),)
    if recipe.storage == "fp8":
        return SafetensorsTensor(name, "F8_E4M3", shape), SafetensorsTensor(f"{name}_scale", "F32", shape[:1])
    if recipe.storage == "convrot":
        stored = official(name)
        mark = SafetensorsTensor(f"{stored.removesuffix('weight')}comfy_quant", "U8", (len(COMFY_BYTES),))
        return SafetensorsTensor(stored, "I8", shape), SafetensorsTensor(f"{stored}_scale", "F32", column), mark
    stem = name.removesuffix("weight") + "_weight"
    return SafetensorsTensor(f"{stem}_qdata", "I8", shape), SafetensorsTensor(f"{stem}_scale", "F32", column)
