"""Files filled in place, in any order, and a journal of what is done.

A file gets its header and its full size at once, then its tensors one by one, each where the header says. The journal
keeps a hash of every unit written, so that a run that continues believes bytes, not promises: what a crash or a power
cut lost is written again. Nothing here is synchronized with the disk; that is done once, before publishing (store.py).

Left out: locking (store.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ideogram_app.checkpoints.formats import Blank
from ideogram_app.checkpoints.manifest import write_text
from ideogram_app.errors import CheckpointError


class Journal:
    """Which units are done, with a hash of their bytes, one JSON line each; the first line says of what job."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self._identity = path, identity
        lines = _json_lines(path)
        self.resumed = bool(lines) and lines[0] == identity
        lines = lines[1:] if self.resumed else []
        self._done = {(line["branch"], line["unit"]): line["sha256"] for line in lines}

    def begin(self) -> None:
        """Forget what another job left."""
        write_text(self.path, json.dumps(self._identity) + "\n")

    def __contains__(self, unit: tuple[str, str]) -> bool:
        return unit in self._done

    def vouches(self, unit: tuple[str, str], held: bytes) -> bool:
        return self._done.get(unit) == hashlib.sha256(held).hexdigest()

    def add(self, unit: tuple[str, str], held: bytes) -> None:
        line = {"branch": unit[0], "unit": unit[1], "sha256": hashlib.sha256(held).hexdigest()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line))  # a torn line ends where the next begins


def make_blank(path: Path, blank: Blank) -> None:
    """A file of the right size with the right header, there as a whole or not at all; one that fits is kept."""
    if path.is_file() and path.stat().st_size == blank.size:
        with path.open("rb") as file:
            if file.read(len(blank.header)) == blank.header:
                return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    with draft.open("wb") as file:
        file.write(blank.header)
        file.truncate(blank.size)
    draft.replace(path)


def write_at(file: FileIO, start: int, stop: int, tensor: Tensor) -> None:
    """Put a tensor's bytes into a span of the file.

    Raises:
        CheckpointError: they do not fill the span.
    """
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    if raw.nbytes != stop - start:
        raise CheckpointError(f"A packed tensor does not fit its place in {file.name}", got=f"{raw.nbytes:,} bytes")
    file.seek(start)
    while raw:
        raw = raw[file.write(raw) :]


def read_spans(file: FileIO, spans: Sequence[tuple[int, int]]) -> bytes:
    """The bytes at these places, as the file has them."""
    parts = []
    for start, stop in spans:
        file.seek(start)
        parts.append(file.read(stop - start))
    return b"".join(parts)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a journal that can be read; a run that was killed may have torn one."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines
