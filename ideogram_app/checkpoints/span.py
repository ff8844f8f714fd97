"""Span: the bytes of a tensor, or of some of its rows, in a file, and how readers make tensors of them.

safetensors.py and gguf.py find the `Span` of a tensor. A `Reader` makes a tensor of it: at once (`Span.read`), from
what was prefetched (prefetch.py), or without its numbers (`without`). Left out: memory maps. Weights in memory must not
change when their file does, so they are copied once in any case, and mapped pages cost a fault each on top of that.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ideogram_app.errors import CheckpointError


@dataclass(frozen=True)
class Span:
    """A tensor, or rows of one, in a file; `start` in bytes from its beginning, `name` for messages."""

    path: Path
    name: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def rows(self, rows: slice | None) -> Span:
        """The span of some of its rows; itself for None."""
        if rows is None:
            return self
        first, stop, _ = rows.indices(self.shape[0])
        start = self.start + first * (self.size // max(1, self.shape[0]))
        return replace(self, start=start, shape=(stop - first, *self.shape[1:]))

    def read(self) -> Tensor:
        """The tensor, read now into host memory.

        Raises:
            CheckpointError: the file ends too early or cannot be read.
        """
        raw = torch.empty(self.size, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            self.fill(file, 0, raw)
        return self.shaped(raw)

    def fill(self, file: FileIO, offset: int, into: Tensor) -> None:
        """Read the bytes from `offset` of the span on, as many as `into` (uint8, in host memory) takes, from its file.

        Raises:
            CheckpointError: the file ends too early or cannot be read.
        """
        view, done = into.numpy().data, 0
        try:
            file.seek(self.start + offset)
            while done < len(view):
                got = file.readinto(view[done:])
                if not got:
                    break
                done += got
        except OSError as problem:
            raise CheckpointError(f"{self.path} cannot be read at {self.name}", got=str(problem)) from problem
        if done < len(view):
            raise CheckpointError(
                f"{self.path} ended inside {self.name}",
                expected=f"{self.size:,} bytes",
                got=f"{offset + done:,} bytes",
                do="Fetch or prepare it again",
            )

    def shaped(self, raw: Tensor) -> Tensor:
        """The tensor as a view of its bytes, uint8 (size,) on any device."""
        return raw.view(self.dtype).view(self.shape)


def joined(rows: Sequence[Tensor]) -> Tensor:
    """Rows that were read apart, as one tensor; a single one is not copied."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


class Reader(Protocol):
    """How a span becomes a tensor: `Span.read`, `Prefetcher.take`, or what `without` gives."""

    def __call__(self, span: Span, /) -> Tensor: ...


def without(left_out: Collection[Span], reader: Reader) -> Reader:
    """A reader that puts these spans on the meta device, shapes without numbers; any other is read by `reader`."""

    def read(span: Span, /) -> Tensor:
        return torch.empty(span.shape, dtype=span.dtype, device="meta") if span in left_out else reader(span)

    return read


def open_in_order(path: Path) -> FileIO:
    """A file to be read span by span, in order; Linux is told so that it reads ahead.

    Raises:
        CheckpointError: it cannot be opened.
    """
    try:
        file = path.open("rb", buffering=0)
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be opened", got=str(problem), do="Fetch or prepare it again") from problem
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file
