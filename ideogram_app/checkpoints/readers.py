"""A branch's weights from any layout this version reads, as a lazy stream of (official diffusers name, tensor).

    dense  float32, bfloat16 or float16, as diffusers saves it
    fp8    float8_e4m3fn with `<name>.weight_scale`, as Ideogram publishes it

each with attention split (`to_q`, `to_k`, `to_v`, `to_out.0`) or fused (`qkv`, rows in thirds, and `o`), in one file or
in shards. The layout is found in the headers, never in the names of files, and every tensor is accounted for before the
first is read: unknown, missing, doubled or wrongly shaped ones are an error that names file and tensor.

diffusers' own loader drops unknown tensors with a warning; on fused FP8 files it then draws noise. Left out: NF4,
ComfyUI's and others' GGUF and INT8 files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ideogram_app.architecture import Branch
from ideogram_app.checkpoints.safetensors_file import DTYPES, SafetensorsFile, TensorInfo
from ideogram_app.errors import CheckpointError
from ideogram_app.quantization import fp8

DENSE_TYPES = ("F32", "BF16", "F16")
SCALE = "_scale"  # `x.weight` has its scales in `x.weight_scale`
FUSED = {".attention.qkv.": (".attention.to_q.", ".attention.to_k.", ".attention.to_v.")}
RENAMED = (".attention.o.", ".attention.to_out.0.")


@dataclass(frozen=True)
class Origin:
    """Where a tensor comes from: a stored tensor, or one third of its rows."""

    file: SafetensorsFile
    name: str
    third: int | None = None

    @property
    def info(self) -> TensorInfo:
        return self.file.infos[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.info.shape
        return shape if self.third is None or not shape else (shape[0] // 3, *shape[1:])

    def read(self) -> Tensor:
        if self.third is None:
            return self.file.tensor(self.name)
        rows = self.shape[0]
        return self.file.tensor(self.name, slice(self.third * rows, (self.third + 1) * rows))


class SourceBranch:
    """One transformer of a source, whatever its layout.

    Attributes:
        files: what is read, in the order of their names.
        layout: dense or fp8.
        config: the branch's config.json.
        dtypes: name to the type a tensor has when it is not packed; what was FP8 is held in bfloat16.

    Raises:
        CheckpointError: not what `branch` asks for; the message names file, tensor, expected and got.
    """

    def __init__(self, folder: Path, branch: Branch) -> None:
        self.folder = folder
        self.config = read_config(folder)
        check_config(folder, self.config, branch)
        self.files = [SafetensorsFile(path) for path in weight_files(folder)]
        stored = {info.dtype for file in self.files for info in file.infos.values()}
        self.layout = "fp8" if "F8_E4M3" in stored else "dense"
        origins = _origins(self.files)
        self._origins = _matched(folder, origins, branch.shapes())
        self._scales = self._matched_scales(origins)
        self.dtypes = {
            name: torch.bfloat16 if name in self._scales else DTYPES[origin.info.dtype]
            for name, origin in self._origins.items()
        }

    def tensor(self, name: str) -> Tensor:
        """One tensor by its diffusers name; what was FP8 is widened in float32.

        Raises:
            CheckpointError: no such tensor.
        """
        if name not in self._origins:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        tensor = self._origins[name].read()
        scale = self._scales.get(name)
        return tensor if scale is None else fp8.dequantize_rows(tensor, scale.read())

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self._origins:
            yield name, self.tensor(name)

    def _matched_scales(self, origins: dict[str, Origin]) -> dict[str, Origin]:
        """Check types, and pair FP8 weights with their scales; both directions must hold."""
        scales = {}
        for name, origin in self._origins.items():
            scale = origins.pop(name + SCALE, None)
            if origin.info.dtype == "F8_E4M3":
                _check_scale(origin, scale)
                assert scale is not None
                scales[name] = scale
            elif scale is not None:
                raise CheckpointError(f"{scale.file.path} has scales for {name}, which is not FP8", got=scale.name)
            elif origin.info.dtype not in DENSE_TYPES:
                raise CheckpointError(
                    f"Tensor {origin.name} of {origin.file.path} has a type this version does not read",
                    expected=f"{', '.join(DENSE_TYPES)} or F8_E4M3 with scales",
                    got=origin.info.dtype,
                )
        return scales


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index lists, else all.

    Raises:
        CheckpointError: none, or an index that cannot be read.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            names = set(json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise CheckpointError(f"{indexes[0]} is no index of weights", got=str(problem)) from problem
        return sorted(folder / Path(name).name for name in names)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no weights", expected="at least one .safetensors file")
    return files


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        CheckpointError: missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise CheckpointError(f"There is no file {path}") from problem
    except ValueError as problem:
        raise CheckpointError(f"{path} is damaged", expected="JSON", got=str(problem)) from problem
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is damaged", expected="a JSON object", got=type(config).__name__)
    return config


def check_config(folder: Path, config: dict[str, Any], branch: Branch) -> None:
    """Refuse a folder that holds another model.

    Raises:
        CheckpointError: names the first field that differs.
    """
    for field in fields(branch):
        expected, got = getattr(branch, field.name), config.get(field.name)
        if expected != got:
            raise CheckpointError(
                f"{folder / 'config.json'} describes another model",
                expected=f"{field.name} {expected}",
                got=str(got) if got is not None else "nothing",
            )


def _origins(files: list[SafetensorsFile]) -> dict[str, Origin]:
    """Every stored tensor under its diffusers name; a name met twice is an error."""
    found: dict[str, Origin] = {}
    for file in files:
        for stored in file.infos:
            for name, origin in _renamed(file, stored):
                if name in found:
                    other = found[name]
                    raise CheckpointError(
                        f"Tensor {name} is there twice",
                        got=f"{other.name} in {other.file.path} and {stored} in {file.path}",
                    )
                found[name] = origin
    return found


def _renamed(file: SafetensorsFile, stored: str) -> Iterator[tuple[str, Origin]]:
    """The diffusers name, or three of them, of one stored tensor."""
    for fused, parts in FUSED.items():
        if fused in stored:
            for third, part in enumerate(parts):
                yield stored.replace(fused, part), Origin(file, stored, third)
            return
    yield stored.replace(*RENAMED), Origin(file, stored)


def _matched(folder: Path, origins: dict[str, Origin], shapes: dict[str, tuple[int, ...]]) -> dict[str, Origin]:
    """The expected tensors, each with its origin; anything else left over but scales is an error."""
    weights_of = {name.removesuffix(SCALE) for name in origins if name.endswith(SCALE)}
    unknown = [name for name in origins if name not in shapes and name.removesuffix(SCALE) not in shapes]
    if unknown:
        origin = origins[unknown[0]]
        raise CheckpointError(
            f"{origin.file.path} is of a layout this version does not know",
            expected="a dense or FP8 Ideogram 4 transformer, attention split or fused",
            got=f"{len(unknown)} unknown tensors, first {origin.name} ({origin.info.dtype} {origin.info.shape})",
        )
    missing = [name for name in shapes if name not in origins]
    if missing:
        known = "with scales but no weight" if missing[0] in weights_of else "not there"
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors",
            expected=f"{missing[0]} {shapes[missing[0]]}",
            got=known,
        )
    for name, shape in shapes.items():
        _check_shape(origins[name], name, shape)
    return {name: origins[name] for name in shapes}


def _check_shape(origin: Origin, name: str, shape: tuple[int, ...]) -> None:
    """The stored shape must be the expected one, or three times its rows where it is fused."""
    if origin.third is not None:
        shape = (3 * shape[0], *shape[1:])
    if origin.info.shape != shape:
        raise CheckpointError(
            f"Tensor {origin.name} of {origin.file.path} (here {name}) has the wrong shape",
            expected=str(shape),
            got=str(origin.info.shape),
        )


def _check_scale(origin: Origin, scale: Origin | None) -> None:
    """FP8 weights need one float32 scale a row, fused as they are."""
    rows = origin.info.shape[0]
    if scale is None or scale.info.dtype != "F32" or scale.info.shape != (rows,):
        raise CheckpointError(
            f"The FP8 tensor {origin.name} of {origin.file.path} cannot be widened",
            expected=f"{origin.name}{SCALE}, F32 ({rows},)",
            got=f"{scale.info.dtype} {scale.info.shape}" if scale else "nothing of that name",
        )
