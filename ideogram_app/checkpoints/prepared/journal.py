"""Journal of a resumable preparation: files filled in place, in any order, with a hash of every tensor.

A file gets its header and its full size at once, then its tensors in runs of rows, each where the header says. When a
unit (file_plan.py) is complete the journal gets one line with a hash of each of its tensors' bytes. A run that resumes
checks the bytes: what a crash or a power cut lost is written again, and `hash_parts` finds at the end whether the file
holds what was written. Nothing here is synchronized with the disk; that is done once, before publishing (store.py).

Left out: locking (store.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ideogram_app.checkpoints.prepared.file_plan import FilePlan, Unit
from ideogram_app.errors import CheckpointError
from ideogram_app.files import hash_span, pieces, replacing, write_text


class MismatchError(CheckpointError):
    """What was written is not what it should be: none of it may be used."""


class Journal:
    """The units that are done, with the hashes of their parts, one JSON line each; the first line is an identity.

    A run continues a journal of its own identity, which covers its source files: their hashes are recorded too.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self._identity = path, identity
        lines = _json_lines(path)
        self.resumed = bool(lines) and lines[0] == identity
        lines = lines[1:] if self.resumed else []
        self._done: dict[tuple[str, str], list[str]] = {
            (line["branch"], line["unit"]): line["sha256"] for line in lines if "unit" in line
        }
        self.sources: dict[str, str] = {line["source"]: line["sha256"] for line in lines if "source" in line}

    def begin(self) -> None:
        """Start anew, dropping what a run of another identity left."""
        write_text(self.path, json.dumps(self._identity) + "\n")

    def __contains__(self, unit: tuple[str, str]) -> bool:
        return unit in self._done

    def hashes(self, branch: str, unit: Unit) -> dict[str, str]:
        """Name to SHA-256 of the parts of a unit that is done."""
        return dict(zip((part.name for part in unit.parts), self._done[branch, unit.name], strict=True))

    def is_intact(self, branch: str, unit: Unit, file: FileIO, plan: FilePlan) -> bool:
        """Whether a unit was done and the file still holds what was written."""
        if (branch, unit.name) not in self or len(self._done[branch, unit.name]) != len(unit.parts):
            return False
        expected = self.hashes(branch, unit)
        return all(hash_span(file, *plan.spans[name]) == sha256 for name, sha256 in expected.items())

    def add(self, branch: str, unit: Unit, hashes: Mapping[str, str]) -> None:
        self._done[branch, unit.name] = [hashes[part.name] for part in unit.parts]
        self._append({"branch": branch, "unit": unit.name, "sha256": self._done[branch, unit.name]})

    def add_source(self, name: str, sha256: str) -> None:
        self.sources[name] = sha256
        self._append({"source": name, "sha256": sha256})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(line))  # a torn line ends where the next begins


class UnitWriter:
    """Writes the parts of one unit into a file, run after run of rows, and hashes them on the way."""

    def __init__(self, file: FileIO, plan: FilePlan, unit: Unit) -> None:
        self._file = file
        self._spans = {part.name: plan.spans[part.name] for part in unit.parts}
        self._digests = {part.name: hashlib.sha256() for part in unit.parts}
        self._ends = {name: start for name, (start, _) in self._spans.items()}

    def append(self, name: str, tensor: Tensor) -> None:
        """Write a tensor behind what the part of this name has so far.

        Raises:
            CheckpointError: it reaches past the end of the part.
        """
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        start, stop = self._ends[name], self._spans[name][1]
        if start + raw.nbytes > stop:
            raise CheckpointError(f"{name} does not fit its place in {self._file.name}", got=f"{raw.nbytes:,} bytes")
        self._digests[name].update(raw)
        self._ends[name] += raw.nbytes
        self._file.seek(start)
        while raw:
            raw = raw[self._file.write(raw) :]

    def hashes(self) -> dict[str, str]:
        """Name to SHA-256 of every part.

        Raises:
            CheckpointError: one is not full.
        """
        for name, (_, stop) in self._spans.items():
            if self._ends[name] != stop:
                short = f"{stop - self._ends[name]:,} bytes short"
                raise CheckpointError(f"{name} does not fill its place in {self._file.name}", got=short)
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def create_file(path: Path, plan: FilePlan) -> None:
    """Make a file of the planned size with its header, atomically; one that is there with them stays."""
    if path.is_file() and path.stat().st_size == plan.size:
        with path.open("rb") as file:
            if file.read(len(plan.header)) == plan.header:
                return
    with replacing(path) as draft, draft.open("wb") as file:
        file.write(plan.header)
        file.truncate(plan.size)


def hash_parts(path: Path, plan: FilePlan, expected: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """Hash a file from end to end, and check on the way the hash of every part of it.

    Yields:
        (bytes read since the last, SHA-256 of the file so far): the last one is that of the whole.

    Raises:
        MismatchError: a part does not have its `expected` hash; it names the part.
    """
    whole = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        end = 0
        for name, (start, stop) in sorted(plan.spans.items(), key=lambda item: item[1]):
            for piece in pieces(file, end, start):  # the header, or what aligns a part
                whole.update(piece)
            part = hashlib.sha256()
            for piece in pieces(file, start, stop):
                whole.update(piece)
                part.update(piece)
            if part.hexdigest() != expected[name]:
                raise MismatchError(
                    f"{name} in {path} is not what was written",
                    expected=f"sha256 {expected[name]}",
                    got=part.hexdigest(),
                    do="The disk or the memory of this machine may be failing; prepare it again",
                )
            yield stop - end, whole.hexdigest()
            end = stop
        for piece in pieces(file, end, plan.size):
            whole.update(piece)
        yield plan.size - end, whole.hexdigest()


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; others are skipped, since a run that was killed may have torn one."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]
