"""GGUF files: tensors read from them, mapped or by rows, and the header of a file to be written.

    [magic, version, counts][metadata][name, shape, type, offset of every tensor][their bytes, each aligned to 32]

    header = gguf_header(infos)            tensor = GgufFile(path).tensor(name)

The header is written first, so that a file is filled in place (file_plan.py, journal.py) with one tensor in memory.
`GgufFile` maps the file into memory and returns views: nothing is read before it is used. It reads every type that
gguf-py decodes, because published files mix them; written are floats and the types of k_quants.py.

gguf-py does the reading, and is imported once there is a file; this module adds types in torch, a check at every step,
and errors that name the file. No `general.architecture` is written: published files of this model's transformers carry
no metadata at all, and any value makes one reader or another refuse. Left out: shards, big-endian files.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ideogram_app.checkpoints.span import Span
from ideogram_app.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    import gguf

GGUF_ALIGNMENT = 32  # of every tensor's first byte, where a file names no other
FLOATS: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Of enum ggml_type, the types that are written: floats, and those of k_quants.py.
GGML_TYPES = {"F32": 0, "F16": 1, "BF16": 30, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "Q8_0": 8}
KNOWN_TYPES = tuple(GGML_TYPES)
# What `gguf.dequantize` of gguf-py 0.19 decodes beside these.
OTHER_BLOCKS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
READABLE_TYPES = (*KNOWN_TYPES, *OTHER_BLOCKS)
LONGEST_NAME = 63  # bytes; GGML_MAX_NAME is 64 with its closing zero


@dataclass(frozen=True)
class GgufTensor:
    """A row of a header; `shape` is that of the weights, (rows, columns) or (n,), whatever their packing.

    `dtype` is one of `READABLE_TYPES`; one of `KNOWN_TYPES` where it is to be written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in memory: that of the weights, or (rows, bytes of a packed row)."""
        if self.dtype in FLOATS:
            return self.shape
        import gguf

        *rows, columns = self.shape
        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.dtype]]
        if columns % weights:
            what = f"Rows of {columns} weights cannot be packed as {self.dtype}"
            raise RequestError(what, expected=f"a multiple of its block size, {weights}")
        return *rows, columns // weights * size

    @property
    def held_dtype(self) -> torch.dtype:
        return FLOATS.get(self.dtype, torch.uint8)

    @property
    def byte_count(self) -> int:
        return prod(self.held_shape) * self.held_dtype.itemsize


def gguf_header(infos: Sequence[GgufTensor]) -> bytes:
    """The header of a file with these tensors, GGUF version 3 without metadata.

    The data follow in this order, each from a multiple of `GGUF_ALIGNMENT` on, counted from the file's first byte.
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; gguf-py writes the same bytes, but only to a file.

    Raises:
        RequestError: a type, shape or name that no reader would take.
    """
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), 0)  # magic, version, tensors, keys
    offset = 0  # from where the data begin
    for info in infos:
        _check_writable(info)
        name, sizes = info.name.encode(), info.shape[::-1]  # the innermost size first
        header += struct.pack("<Q", len(name)) + name
        header += struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, GGML_TYPES[info.dtype], offset)
        offset += aligned(info.byte_count)
    return header


def aligned(offset: int) -> int:
    return -(-offset // GGUF_ALIGNMENT) * GGUF_ALIGNMENT


class GgufFile:
    """An open GGUF file, read on demand; `infos` are in file order.

    Raises:
        CheckpointError: missing, truncated, malformed, or holding a type not in `READABLE_TYPES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        fields = reader.fields.items()
        self.metadata: dict[str, Any] = {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}
        self._mapped = {tensor.name: tensor for tensor in reader.tensors}
        self.infos: dict[str, GgufTensor] = {name: self._info(tensor) for name, tensor in self._mapped.items()}

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """A view of the mapped file: floats as `info.shape`, a block type as uint8 (rows, bytes of a row).

        It may be written to, which changes memory and never the file. Rows are read into memory of their own instead:
        pages of a mapping, once touched, count as the process's memory until it is gone.

        Raises:
            CheckpointError: no tensor of that name.
        """
        span = self.span(name, rows)
        if rows is not None:
            return span.read()
        return span.shaped(torch.from_numpy(np.asarray(self._mapped[name].data).reshape(-1).view(np.uint8)))

    def span(self, name: str, rows: slice | None = None) -> Span:
        """The span of a tensor, or of some of its rows; raises like `tensor`."""
        if name not in self._mapped:
            raise CheckpointError(
                f"{self.path.name} holds no tensor {name}", got=f"{len(self._mapped)}: {', '.join(self._mapped):.200}"
            )
        info, start = self.infos[name], int(self._mapped[name].data_offset)
        return Span(self.path, name, start, dtype=info.held_dtype, shape=info.held_shape).rows(rows)

    def _info(self, tensor: gguf.ReaderTensor) -> GgufTensor:
        kind = tensor.tensor_type.name
        if kind not in READABLE_TYPES:
            raise CheckpointError(
                f"Tensor {tensor.name} of {self.path.name} has a type this program cannot read",
                expected=" or ".join(READABLE_TYPES),
                got=kind,
            )
        return GgufTensor(tensor.name, tuple(int(size) for size in reversed(tensor.shape)), kind)


@cache
def _bounded_reader() -> type[gguf.GGUFReader]:
    """gguf-py's reader, which checks at every access that the file reaches that far."""
    import gguf

    class BoundedReader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if end > len(self.data):
                raise CheckpointError(
                    "This GGUF file is truncated, or its header is damaged",
                    expected=f"at least {end:,} bytes",
                    got=f"{len(self.data):,}",
                )
            return super()._get(offset, dtype, count, override_order)

    return BoundedReader


def _open(path: Path) -> gguf.GGUFReader:
    """Map a file and read its header; whatever goes wrong is a `CheckpointError`."""
    again = f"Fetch or convert {path} again"
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}")
    size = path.stat().st_size
    if size == 0:  # cannot be mapped
        raise CheckpointError(f"{path.name} is empty", expected="a GGUF file", got="0 bytes", do=again)
    try:
        reader = _bounded_reader()(path, mode="c")  # copy on write: torch wants writable memory
    except CheckpointError as problem:
        raise CheckpointError(
            f"{path.name} cannot be read: {problem.what}", expected=problem.expected, got=problem.got, do=again
        ) from problem
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as problem:
        raise CheckpointError(
            f"{path.name} is not a GGUF file this program can read",
            expected="GGUF version 2 or 3, undamaged",
            got=f"{size:,} bytes: {problem}",
            do=again,
        ) from problem
    if reader.byte_order != "I":
        raise CheckpointError(f"{path.name} has the other byte order", expected="a little-endian file", do=again)
    return reader


def _check_writable(info: GgufTensor) -> None:
    if info.dtype not in KNOWN_TYPES:
        raise RequestError(f"Tensor {info.name} cannot be written as {info.dtype}", expected=" or ".join(KNOWN_TYPES))
    if len(info.name.encode()) > LONGEST_NAME:
        raise RequestError(f"The name {info.name} is too long for GGUF", expected=f"at most {LONGEST_NAME} bytes")
    if not 1 <= len(info.shape) <= 4:
        raise RequestError(f"Tensor {info.name} cannot be written", expected="1 to 4 dimensions", got=str(info.shape))
