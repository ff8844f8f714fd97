"""Safetensors files: headers read and checked, single tensors or rows read, headers written before the data exist.

    [length of header, 8 bytes][header: JSON, name -> dtype, shape, data_offsets][data, without gaps]

The safetensors package maps a file and refuses a bad one with a message that names no file; it writes a file only from
all of its tensors at once. Here a header says what is wrong with which file, a tensor is read alone (or only some of
its rows), and `layout` gives tensors their offsets before they are computed, so that a file is filled in any order.

Left out: mapping files into memory, dtypes no checkpoint of this model has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ideogram_app.checkpoints.span import Span
from ideogram_app.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # the limit of the safetensors package


@dataclass(frozen=True)
class SafetensorsTensor:
    """A row of a header; `start` and `stop` count from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    @property
    def size(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsFile:
    """A safetensors file whose header has been read and agrees with its size; `infos` are in file order.

    Raises:
        CheckpointError: missing, truncated, not safetensors, or a tensor named twice; the message names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header, start = _read_header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        infos = [_info(path, name, row, start) for name, row in header.items()]
        self.infos = {info.name: info for info in sorted(infos, key=lambda info: info.start)}
        expected, got = max((info.stop for info in infos), default=start), path.stat().st_size
        if expected != got:
            raise CheckpointError(
                f"{path} is {'truncated' if got < expected else 'longer than its header says'}",
                expected=f"{expected:,} bytes",
                got=f"{got:,} bytes",
                do="Fetch or prepare it again",
            )

    def tensor(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or some of its rows, read into host memory; raises like `span`."""
        return self.span(name, rows).read()

    def span(self, name: str, rows: slice | None = None) -> Span:
        """The span of a tensor, or of some of its rows.

        Raises:
            CheckpointError: no such tensor, or a dtype this program does not read.
        """
        info = self.infos.get(name)
        if info is None:
            raise CheckpointError(f"{self.path} holds no tensor {name}")
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"Tensor {name} of {self.path} has a type this program does not read",
                expected=" or ".join(DTYPES),
                got=info.dtype,
            )
        return Span(self.path, name, info.start, dtype=DTYPES[info.dtype], shape=info.shape).rows(rows)


def layout(
    infos: Sequence[SafetensorsTensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, SafetensorsTensor]]:
    """The header of a file to be written, and its rows with `start` and `stop`.

    Wide types come first, so that every tensor is aligned to its type whatever the others' sizes.
    """
    ordered = sorted(infos, key=lambda info: (-DTYPES[info.dtype].itemsize, info.name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for info in ordered:
        ends = [offset, offset := offset + info.size]
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": ends}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    placed, start = {}, 8 + len(text)
    for info in ordered:
        placed[info.name] = replace(info, start=start, stop=start + info.size)
        start += info.size
    return len(text).to_bytes(8, "little") + text, placed


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header as JSON, and where the data begin."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}", do="Fetch or prepare it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > LARGEST_HEADER:
            raise _not_safetensors(path, f"{size:,} bytes, the first of which are no length of a header")
        text = file.read(length)
    if len(text) < length:
        raise CheckpointError(
            f"{path} is truncated inside its header",
            expected=f"at least {8 + length:,} bytes",
            got=f"{size:,} bytes",
            do="Fetch or prepare it again",
        )
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except ValueError as problem:  # also of text that is not UTF-8
        raise _not_safetensors(path, f"a header that is no JSON: {problem}") from problem
    if not isinstance(header, dict):
        raise _not_safetensors(path, f"a header that is a {type(header).__name__}")
    return header, 8 + length


def _info(path: Path, name: str, row: Any, start: int) -> SafetensorsTensor:
    """One row of a header, checked: its size must agree with shape and dtype."""
    try:
        begin, end = (int(offset) for offset in row["data_offsets"])
        info = SafetensorsTensor(
            name, str(row["dtype"]), tuple(int(n) for n in row["shape"]), start + begin, start + end
        )
    except (KeyError, TypeError, ValueError) as problem:
        raise _not_safetensors(path, f"a header whose row {name} is not readable") from problem
    if begin < 0 or end < begin or (info.dtype in DTYPES and info.size != end - begin):
        raise CheckpointError(
            f"The header of {path} contradicts itself at {name}",
            expected=f"{info.size:,} bytes for {info.dtype} {info.shape}" if info.dtype in DTYPES else "a span",
            got=f"{end - begin:,} bytes",
        )
    return info


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON objects keep the last of two equal names; a checkpoint must not have two."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise CheckpointError(f"The header of {path} names {name} twice")
        found[name] = value
    return found


def _not_safetensors(path: Path, got: str) -> CheckpointError:
    return CheckpointError(f"{path} is no safetensors file", expected="a header, then data", got=got)
