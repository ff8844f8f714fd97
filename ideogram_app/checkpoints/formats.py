"""What a recipe's files hold: the half that writes and the half that reads, side by side.

    storage  file of a branch                                        a packed Linear x
    dense    <branch>/diffusion_pytorch_model.safetensors            x.weight
    fp8      the same                                                x.weight (float8), x.weight_scale (rows,)
    int8     the same, as torchao and diffusers save it              x._weight_qdata (int8), x._weight_scale (rows, 1)
    gguf     <model>-<type>.gguf and <model>_uncond-<type>.gguf      x.weight, `attention.qkv` and `attention.o` fused

Everything that is not packed keeps the source's type; GGUF holds it as F32, where bfloat16 loses nothing. Beside every
branch's weights stands its config.json; the one of int8 lets an unmodified `from_pretrained` load the folder.

A `Unit` is what is made and written at once: the tensors of one Linear, or of the three that GGUF fuses. `blank` says
where in a file each will lie before any is computed. GGUF files carry no metadata, because any value makes one reader
or another refuse; the manifest (store.py) says what they are. Left out: shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ideogram_app.architecture import Branch
from ideogram_app.checkpoints.gguf_file import GgufFile, GgufWriter
from ideogram_app.checkpoints.gguf_file import TensorInfo as GgufInfo
from ideogram_app.checkpoints.safetensors_file import NAMES, SafetensorsFile, TensorInfo, layout
from ideogram_app.checkpoints.sources import BRANCHES
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.quantization import fp8, int8, k_quants
from ideogram_app.recipes import Recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name diffusers looks for
GGUF_ALIGNMENT = 32
SPLIT, FUSED = ("to_q", "to_k", "to_v"), "qkv"


@dataclass(frozen=True)
class Unit:
    """What is written at once.

    Attributes:
        inputs: names of the source's tensors it is made of.
        parts: the tensors in the file, of which the first names the unit.
        packed: whether the recipe packs it.
    """

    inputs: tuple[str, ...]
    parts: tuple[TensorInfo | GgufInfo, ...]
    packed: bool

    @property
    def name(self) -> str:
        return self.parts[0].name


@dataclass(frozen=True)
class Blank:
    """A file without its data: the header, the span of every part, the size of the whole."""

    header: bytes
    spans: dict[str, tuple[int, int]]
    size: int


@dataclass(frozen=True)
class PackedWeight:
    """A Linear's weight as it rests: `values` and, by storage, the `scale` of each row (rows,) or the block type."""

    storage: str
    values: Tensor
    scale: Tensor | None = None
    gguf_type: str = ""

    def decoded(self) -> Tensor:
        """float32 (rows, columns)."""
        if self.storage == "gguf":
            return k_quants.decode(self.values, self.gguf_type)
        assert self.scale is not None
        widen = fp8.dequantize_rows if self.storage == "fp8" else int8.dequantize_rows
        return widen(self.values, self.scale)


def branch_file(model: str, recipe: Recipe, branch_name: str) -> str:
    """Where a branch's weights lie inside a prepared folder."""
    if recipe.storage != "gguf":
        return f"{branch_name}/{WEIGHTS}"
    return f"{model}{'' if branch_name == BRANCHES[0] else '_uncond'}-{recipe.gguf_type}.gguf"


def units(recipe: Recipe, branch: Branch, dtypes: Mapping[str, torch.dtype]) -> list[Unit]:
    """Everything a branch's file will hold; `dtypes` are those of tensors that are not packed."""
    shapes = branch.shapes()
    linears = {f"{linear.name}.weight" for linear in branch.linears() if recipe.packs(linear.name)}
    made = []
    for name, shape in shapes.items():
        if recipe.storage == "gguf":
            if not any(f".{part}." in name for part in SPLIT[1:]):  # those come with to_q
                made.append(_gguf_unit(recipe, name, shape, name in linears))
        elif name in linears:
            made.append(Unit((name,), _packed_parts(recipe, name, shape), True))
        else:
            made.append(Unit((name,), (TensorInfo(name, NAMES[dtypes[name]], shape),), False))
    return made


def pack(recipe: Recipe, unit: Unit, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of a unit's parts, from those of its inputs."""
    if recipe.storage == "gguf":
        kind = recipe.gguf_type if unit.packed else None
        return [torch.cat([k_quants.encode(tensor, kind) if kind else tensor.float() for tensor in tensors])]
    (tensor,) = tensors
    if not unit.packed:
        part = unit.parts[0]
        assert isinstance(part, TensorInfo)
        return [tensor.to(next(dtype for dtype, name in NAMES.items() if name == part.dtype))]
    if recipe.storage == "fp8":
        return list(fp8.quantize_rows(tensor))
    values, scale = int8.quantize_rows(tensor)
    return [values, scale.unsqueeze(-1)]


def blank(recipe: Recipe, made: Sequence[Unit], dtype: torch.dtype) -> Blank:
    """The file that `made` will fill; `dtype` is that of dense layers, which torchao's metadata records."""
    parts = [part for unit in made for part in unit.parts]
    if recipe.storage == "gguf":
        return _blank_gguf([part for part in parts if isinstance(part, GgufInfo)])
    metadata = {"format": "pt", **(_torchao_metadata(made, dtype) if recipe.storage == "int8" else {})}
    header, placed = layout([part for part in parts if isinstance(part, TensorInfo)], metadata)
    spans = {name: (info.start, info.stop) for name, info in placed.items()}
    return Blank(header, spans, max(info.stop for info in placed.values()))


def branch_config(recipe: Recipe, branch: Branch, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a prepared branch: the source's, and for int8 how diffusers has to read the weights."""
    kept = {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config")}
    if recipe.storage == "int8":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        protected = [linear.name for linear in branch.linears() if not recipe.packs(linear.name)]
        settings = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=protected)
        kept["quantization_config"] = settings.to_dict()
    return kept


class PackedBranch:
    """One prepared transformer: dense tensors and packed weights by their diffusers names, read on demand.

    Raises:
        CheckpointError: the file is not what the recipe asks for; the message names file, tensor, expected and got.
    """

    def __init__(self, path: Path, recipe: Recipe, branch: Branch) -> None:
        self.path, self.recipe = path, recipe
        self.packed = {linear.name for linear in branch.linears() if recipe.packs(linear.name)}
        self._shapes = branch.shapes()
        self._file = GgufFile(path) if recipe.storage == "gguf" else SafetensorsFile(path)
        self._check(branch)

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that is not packed."""
        for name, shape in self._shapes.items():
            if name.removesuffix(".weight") not in self.packed:
                yield name, self._rows(name, shape)

    def weight(self, linear: str) -> PackedWeight:
        """The packed weight of a Linear."""
        name, storage = f"{linear}.weight", self.recipe.storage
        if storage == "gguf":
            return PackedWeight(storage, self._rows(name, self._shapes[name]), gguf_type=str(self.recipe.gguf_type))
        values, scale = (part.name for part in _packed_parts(self.recipe, name, self._shapes[name]))
        return PackedWeight(storage, self._file.tensor(values), self._file.tensor(scale).reshape(-1))

    def _rows(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor, cut out of the fused one where GGUF fuses; in memory of its own."""
        if not isinstance(self._file, GgufFile):
            return self._file.tensor(name)
        whole = self._file.tensor(_fused(name))
        third = next((index for index, part in enumerate(SPLIT) if f".{part}." in name), 0)
        return whole[third * shape[0] : (third + 1) * shape[0]].clone()

    def _check(self, branch: Branch) -> None:
        infos: Mapping[str, TensorInfo | GgufInfo] = self._file.infos
        any_float = dict.fromkeys(self._shapes, torch.float32)  # packed parts have one type, the rest any float
        expected = {part.name: (part, unit) for unit in units(self.recipe, branch, any_float) for part in unit.parts}
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


def _kind(info: TensorInfo | GgufInfo) -> str:
    return info.gguf_type if isinstance(info, GgufInfo) else info.dtype


def _fused(name: str) -> str:
    """The official name of a diffusers tensor."""
    for part in SPLIT:
        name = name.replace(f"attention.{part}.", f"attention.{FUSED}.")
    return name.replace("attention.to_out.0.", "attention.o.")


def _gguf_unit(recipe: Recipe, name: str, shape: tuple[int, ...], packed: bool) -> Unit:
    kind = str(recipe.gguf_type) if packed else "F32"
    if f".{SPLIT[0]}." not in name:
        return Unit((name,), (GgufInfo(_fused(name), shape, kind),), packed)
    inputs = tuple(name.replace(f".{SPLIT[0]}.", f".{part}.") for part in SPLIT)
    return Unit(inputs, (GgufInfo(_fused(name), (3 * shape[0], shape[1]), kind),), packed)


def _packed_parts(recipe: Recipe, name: str, shape: tuple[int, ...]) -> tuple[TensorInfo, TensorInfo]:
    """Values and scales of a Linear in a safetensors file."""
    if recipe.storage == "fp8":
        return TensorInfo(name, "F8_E4M3", shape), TensorInfo(f"{name}_scale", "F32", shape[:1])
    stem = name.removesuffix("weight") + "_weight"
    return TensorInfo(f"{stem}_qdata", "I8", shape), TensorInfo(f"{stem}_scale", "F32", (shape[0], 1))


def _blank_gguf(infos: Sequence[GgufInfo]) -> Blank:
    """gguf-py's header, which it writes nowhere but to a file; data follow aligned, each padded."""
    with TemporaryDirectory() as folder:
        scratch = Path(folder) / "header.gguf"
        with suppress(RequestError):  # closing before any tensor is written: only the header is wanted
            GgufWriter(scratch, infos).close()
        header = scratch.read_bytes()
    end = _aligned(len(header))
    spans = {}
    for info in infos:
        spans[info.name] = (end, end + info.byte_count)
        end = _aligned(end + info.byte_count)
    return Blank(header, spans, end)


def _aligned(offset: int) -> int:
    return -(-offset // GGUF_ALIGNMENT) * GGUF_ALIGNMENT


def _torchao_metadata(made: Sequence[Unit], dtype: torch.dtype) -> dict[str, str]:
    """What torchao's `flatten_tensor_state_dict` would say of these tensors, without having them."""
    from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    metadata = {"tensor_names": json.dumps([unit.inputs[0] for unit in made])}
    for unit in made:
        row: Any = {"_type": "Tensor"}
        if unit.packed:
            columns = unit.parts[0].shape[1]
            values, scale = torch.zeros(1, columns, dtype=torch.int8), torch.ones(1, 1)
            per_token = QuantizeTensorToInt8Kwargs(granularity=PerRow())
            row = Int8Tensor(values, scale, [1, columns], dtype, act_quant_kwargs=per_token)
        metadata[unit.inputs[0]] = json.dumps(row, cls=TensorSubclassAttributeJSONEncoder)
    return metadata
