"""Where a tensor lies: a file, a place in it, and what its bytes mean. Every read of weights goes through here.

Both kinds of files (safetensors.py, gguf.py) say of a tensor, or of some of its rows, which `Span` it is. A
`Reader` makes a tensor of it: at once (`Span.read`), from what was prefetched (prefetch.py), or without its numbers
(`without`). Left out: memory maps. Weights that are kept must not change when their file does, so they are copied once
in any case, and pages that are mapped cost a fault each on top of that.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ideogram_app.errors import CheckpointError


@dataclass(frozen=True)
class Span:
    """Bytes of a file that are a tensor, or rows of one.

    Attributes:
        name: of the tensor in the file, for messages.
        start: in bytes from the beginning of the file.
    """

    path: Path
    name: str
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, read now, in memory of its own.

        Raises:
            CheckpointError: the file ends too early or cannot be read.
        """
        raw = torch.empty(self.size, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            self.fill(file, 0, raw)
        return self.shaped(raw)

    def fill(self, file: FileIO, offset: int, into: Tensor) -> None:
        """Read the bytes from `offset` of the span on, as many as `into` (uint8, in host memory) takes.

        Args:
            file: the open file of the span.

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
        """The bytes, uint8 (size,) on any device, as the tensor that they are; nothing is copied."""
        return raw.view(self.dtype).view(self.shape)


class Reader(Protocol):
    """How a span becomes a tensor: `Span.read`, `Prefetcher.take`, or what `without` gives."""

    def __call__(self, span: Span, /) -> Tensor: ...


def without(left_out: Collection[Span], reader: Reader) -> Reader:
    """A reader that gives these spans shapes and no numbers, on the meta device; any other is read as `reader` does."""

    def read(span: Span, /) -> Tensor:
        return torch.empty(span.shape, dtype=span.dtype, device="meta") if span in left_out else reader(span)

    return read


def open_in_order(path: Path) -> FileIO:
    """A file to be read span by span, the next one behind the last, which the system is told where it listens.

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
