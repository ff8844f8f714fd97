"""Codecs of published tensors: dense, FP8, INT8, NF4, GGML; one table row each, with shape check and dequantizing.

    dense  F32, BF16 or F16                                W as stored
    fp8    F8_E4M3 + scale                                 W = values * scale              one scale, or one a row
    int8   I8 + scale (+ smooth) (+ note)                  W = values * scale / smooth     then rotated if noted
    nf4    U8 + absmax + levels + state (+ nested scales)  quantization/nf4.py
    ggml   a block type of GGUF                            quantization/k_quants.py, else gguf-py

The codec is found for every tensor by itself, from its type and from the tensors beside it, because files mix them,
GGUF files above all. Only the rows asked for are read and dequantized, to float32; what is dense keeps its type.

ComfyUI notes the format of a weight as JSON, in a tensor beside it or in the metadata of the file. The note of an INT8
weight says whether it was rotated, so notes are followed, and an unknown one is refused. Left out: nvfp4, fp4, MXFP8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from ideogram_app.checkpoints.gguf import FLOATS, OTHER_BLOCKS
from ideogram_app.checkpoints.published.tensor_names import ROLES, WEIGHT
from ideogram_app.checkpoints.safetensors import SafetensorsFile
from ideogram_app.checkpoints.weight_files import WeightFile, json_object
from ideogram_app.errors import CheckpointError
from ideogram_app.quantization import k_quants, nf4
from ideogram_app.quantization.rotation import GROUP, rotate

NOTED = "_quantization_metadata"  # ComfyUI's key for notes in the metadata of the file
NOTES = {"F8_E4M3": "float8_e4m3fn", "I8": "int8_tensorwise"}  # type of a weight -> format its note must name
ROTATIONS = tuple(4**power for power in range(1, 7))  # sizes of regular Hadamard matrices
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # by tensor name


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file, by its name there."""

    file: WeightFile
    name: str

    @property
    def dtype(self) -> str:
        return self.file.infos[self.name].dtype

    @property
    def shape(self) -> Shape:
        return self.file.infos[self.name].shape

    def read(self, rows: slice | None = None) -> Tensor:
        return self.file.tensor(self.name, (rows or slice(None)) if self.shape else None)

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype} {self.shape}"


@dataclass(frozen=True)
class Codec:
    """One way to store a tensor.

    Attributes:
        needs, may: roles (tensor_names.py) of the tensors that must and may stand beside the weight.
        shape: checks these parts against each other and returns the shape of the weights.
        dequantize: the rows of a slice with start and stop, float32 or as they are stored.
    """

    name: str
    dtypes: tuple[str, ...]
    shape: Callable[[EncodedTensor], Shape]
    dequantize: Callable[[EncodedTensor, slice], Tensor]
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()

    def takes(self, parts: Mapping[str, TensorEntry]) -> bool:
        beside = set(parts) - {WEIGHT}
        return parts[WEIGHT].dtype in self.dtypes and set(self.needs) <= beside <= {*self.needs, *self.may}

    def __str__(self) -> str:
        suffixes = [next(suffix for suffix, role in ROLES.items() if role == need) for need in self.needs]
        return " or ".join(self.dtypes) + (f" with {', '.join(suffixes)}" if suffixes else "")


class EncodedTensor:
    """One matrix or vector as it is stored, with the scales and notes beside it.

    Attributes:
        parts: role to entry; `WEIGHT` is always among them.
        settings: the JSON that came with it: ComfyUI's note, bitsandbytes' state.
        shape: of the weights.

    Raises:
        CheckpointError: no codec takes these parts, or they contradict each other.
    """

    def __init__(self, parts: Mapping[str, TensorEntry]) -> None:
        self.parts, self.weight = parts, parts[WEIGHT]
        self.settings = self._settings()
        noted = self.settings.get("format", "")
        codec = next((codec for codec in CODECS if codec.takes(parts)), None)
        if codec is None or (noted and NOTES.get(self.weight.dtype) != noted):
            beside = [str(entry) for role, entry in parts.items() if role != WEIGHT]
            shown = CODECS[:-1] if isinstance(self.weight.file, SafetensorsFile) else CODECS[-1:]
            raise CheckpointError(
                f"Tensor {self.weight.name} of {self.weight.file.path} is packed in a way this version does not read",
                expected="; ".join(str(codec) for codec in shown),
                got=" with ".join([str(self.weight), *beside]) + (f", noted as {noted}" if noted else ""),
            )
        self.codec = codec
        self.shape = codec.shape(self)

    @property
    def dtype(self) -> torch.dtype:
        """Its type where it is dense; what was packed counts as bfloat16, as the tensors around it are."""
        return FLOATS[self.weight.dtype] if self.codec.name == "dense" else torch.bfloat16

    def read(self, rows: slice) -> Tensor:
        """Some rows, dequantized: start and stop must be numbers within the shape."""
        if rows.start == rows.stop:
            dtype = self.dtype if self.codec.name == "dense" else torch.float32
            return torch.empty(0, *self.shape[1:], dtype=dtype)
        return self.codec.dequantize(self, rows)

    def error(self, entry: TensorEntry | None, expected: str) -> CheckpointError:
        return CheckpointError(
            f"The packed tensor {self.weight.name} of {self.weight.file.path} cannot be widened",
            expected=expected,
            got=str(entry) if entry else "nothing of that name",
        )

    def _settings(self) -> dict[str, Any]:
        """The note or state beside the weight, else the note on its module in the metadata."""
        entry = self.parts.get("note") or self.parts.get("state") or self.weight
        what = f"What {entry.file.path} says of {entry.name} cannot be read"
        if entry is not self.weight:
            return json_object(bytes(entry.read().flatten().view(torch.uint8).numpy()), what)
        noted = self.weight.file.metadata.get(NOTED)
        if not isinstance(noted, str):
            return {}
        layers = json_object(noted.encode(), what).get("layers", {})
        found = layers.get(self.weight.name.removesuffix(".weight"), {}) if isinstance(layers, dict) else {}
        return found if isinstance(found, dict) else {}


def _scaled_shape(stored: EncodedTensor) -> Shape:
    """Matrices with one float32 scale, or one a row; smoothing and rotation must fit the columns."""
    shape, scale, smooth = stored.weight.shape, stored.parts["scale"], stored.parts.get("smooth")
    if len(shape) != 2:
        raise stored.error(stored.weight, "a matrix")
    if scale.dtype != "F32" or scale.shape not in ((), (1,), (shape[0],), (shape[0], 1)):
        raise stored.error(scale, f"scales, F32 ({shape[0]},)")
    if smooth is not None and (smooth.dtype not in FLOATS or smooth.shape != (shape[1],)):
        raise stored.error(smooth, f"smoothing factors, F32 ({shape[1]},)")
    if stored.settings.get("convrot"):
        group = stored.settings.get("convrot_groupsize", GROUP)
        if group not in ROTATIONS or shape[1] % group:
            known = f"rows of a multiple of {group}" if group in ROTATIONS else f"groups of a power of 4, not {group}"
            raise stored.error(stored.weight, f"rotated weights in {known}")
    return shape


def _dequantize_scaled(stored: EncodedTensor, rows: slice) -> Tensor:
    values, entry = stored.weight.read(rows).float(), stored.parts["scale"]
    scale = entry.read(rows if prod(entry.shape) > 1 else None).view(-1, 1)
    weight = values.mul_(scale)  # (rows, columns)
    if smooth := stored.parts.get("smooth"):
        weight /= smooth.read().float()
    if stored.settings.get("convrot"):
        weight = rotate(weight, int(stored.settings.get("convrot_groupsize", GROUP)))
    return weight


def _nf4_shape(stored: EncodedTensor) -> Shape:
    """bitsandbytes' state has shape and block sizes; the parts must have the lengths that follow from them."""
    state, parts = stored.settings, stored.parts
    try:
        shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
        blocks = ceil(prod(shape) / block)
        lengths = {WEIGHT: ("U8", ceil(prod(shape) / 2)), "absmax": ("F32", blocks), "levels": ("F32", 16)}
        if "nested absmax" in parts:
            runs = ceil(blocks / int(state["nested_blocksize"]))
            lengths |= {"absmax": ("U8", blocks), "nested absmax": ("F32", runs), "nested levels": ("F32", 256)}
            float(state["nested_offset"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as problem:
        raise stored.error(parts["state"], f"a state with shape, blocksize and nested values, not {state}") from problem
    if len(shape) != 2 or block % 2 or state.get("quant_type") != "nf4":
        raise stored.error(parts["state"], f"an NF4 matrix in blocks of an even size, not {state}")
    for role, (dtype, length) in lengths.items():
        entry = parts.get(role)
        if entry is None or entry.dtype != dtype or prod(entry.shape) != length or entry.shape[0] != length:
            raise stored.error(entry, f"{role} as {dtype}, {length:,} of them")
    return shape


def _dequantize_nf4(stored: EncodedTensor, rows: slice) -> Tensor:
    """Blocks run along the flattened matrix: whole blocks are read, and the weights around the rows dropped."""
    parts, state, columns = stored.parts, stored.settings, stored.shape[1]
    block = int(state["blocksize"])
    start, stop = rows.start * columns, rows.stop * columns
    first, last = start // block, ceil(stop / block)
    packed = parts[WEIGHT].read(slice(first * block // 2, last * block // 2)).flatten()
    absmax = parts["absmax"].read(slice(first, last))
    scales = nf4.Scales(absmax)
    if "nested absmax" in parts:
        nested = (parts["nested absmax"].read(), parts["nested levels"].read())
        scales = nf4.Scales(absmax, *nested, int(state["nested_blocksize"]), float(state["nested_offset"]), first)
    weights = nf4.decode(packed, scales, parts["levels"].read(), block)
    return weights[start - first * block : stop - first * block].view(-1, columns)


def _ggml_shape(stored: EncodedTensor) -> Shape:
    if len(stored.weight.shape) != 2:
        raise stored.error(stored.weight, "a matrix: vectors are not packed")
    return stored.weight.shape


def _dequantize_ggml(stored: EncodedTensor, rows: slice) -> Tensor:
    packed, kind = stored.weight.read(rows), stored.weight.dtype
    if kind in k_quants.FORMATS:
        return k_quants.decode(packed, kind)
    import gguf

    return torch.from_numpy(gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind]))


CODECS: tuple[Codec, ...] = (
    Codec("dense", tuple(FLOATS), lambda stored: stored.weight.shape, lambda stored, rows: stored.weight.read(rows)),
    Codec("fp8", ("F8_E4M3",), _scaled_shape, _dequantize_scaled, needs=("scale",), may=("note", "input scale")),
    Codec("int8", ("I8",), _scaled_shape, _dequantize_scaled, needs=("scale",), may=("note", "input scale", "smooth")),
    Codec(
        "nf4",
        ("U8",),
        _nf4_shape,
        _dequantize_nf4,
        needs=("absmax", "levels", "state"),
        may=("nested absmax", "nested levels"),
    ),
    Codec("ggml", (*k_quants.FORMATS, *OTHER_BLOCKS), _ggml_shape, _dequantize_ggml),
)
