"""The manifest of a folder of weights: its files, their sizes and hashes, and what they were made from.

A prepared folder has `manifest.json`; the folder that ships with the program may have `sha256.json`, path to hash.
Hashes are of whole files. Left out: signatures; who can write the files can write their hashes, so these find damage,
not malice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ideogram_app.catalog.recipes import Recipe
from ideogram_app.errors import CheckpointError, RequestError
from ideogram_app.files import cached_hash, hash_file, write_json
from ideogram_app.wire import from_json

MANIFEST_FORMAT = 1  # of the manifest and of everything it lists; a change makes older folders be prepared again
MANIFEST = "manifest.json"
SUMS_FILE = "sha256.json"  # path inside the folder -> sha256
AGAIN = "Prepare it again"


@dataclass(frozen=True)
class FileRow:
    """One file: its path inside the folder, bytes and hash; of a source file also its time of change in nanoseconds."""

    path: str
    size: int
    sha256: str
    changed: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Manifest:
    """What a published folder is, and what it was made from.

    Attributes:
        protected: name fragments of the layers that were in fact left unpacked.
        files: everything in the folder but the manifest.
        created: UTC, ISO 8601.
        calibration: hash of the statistics that scaled the weights or chose what is protected; "" without.
        smoke: relative error of everything that the smoke test compared before the folder was published.
    """

    format: int
    model: str
    recipe: str
    protected: tuple[str, ...]
    source: str
    source_files: tuple[FileRow, ...]
    files: tuple[FileRow, ...]
    app_version: str
    created: str
    calibration: str = ""
    smoke: dict[str, float] = field(default_factory=dict)

    def effective(self, recipe: Recipe) -> Recipe:
        return replace(recipe, protected=self.protected)

    def made_from(self, source: str, folder: Path, files: Sequence[Path]) -> bool:
        """Whether these files of `folder` are the source: by size and time of change where they lay, else by hash."""
        stats = [path.stat() for path in files]
        if [row.size for row in self.source_files] != [stat.st_size for stat in stats]:
            return False
        if self.source == source and [row.changed for row in self.source_files] == [s.st_mtime_ns for s in stats]:
            return True
        return self.source_files == tuple(file_row(path, folder) for path in files)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a published folder.

    Raises:
        CheckpointError: not there or not readable.
    """
    path = folder / MANIFEST
    try:
        return from_json(Manifest, path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise CheckpointError(f"There is no file {path}", do=AGAIN) from problem
    except (RequestError, UnicodeDecodeError) as problem:
        raise CheckpointError(f"{path} is damaged", got=str(problem), do=AGAIN) from problem


def fingerprint(folder: Path) -> str:
    """What weights a folder holds, wherever it lies: SHA-256 of the recorded hashes of its weight files, 16 digits; ""
    where none are recorded."""
    try:
        if (folder / MANIFEST).is_file():
            sums = {row.path: row.sha256 for row in read_manifest(folder).files}
        else:
            sums = json.loads((folder / SUMS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, CheckpointError):
        return ""
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def file_row(path: Path, folder: Path) -> FileRow:
    """The row of a source file, named from a folder where it lies inside it."""
    stat = path.stat()
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
    return FileRow(name, stat.st_size, cached_hash(path), stat.st_mtime_ns)


def write_sums(folder: Path) -> Path:
    """Record the hashes of a pipeline folder's weights and vocabulary, for `verify_sums`."""
    files = sorted([*folder.rglob("*.safetensors"), *folder.rglob("tokenizer.json")])
    sums = {path.relative_to(folder).as_posix(): hash_file(path) for path in files}
    write_json(folder / SUMS_FILE, sums)
    return folder / SUMS_FILE


def verify_sums(folder: Path, parts: tuple[str, ...]) -> None:
    """Compare the files of these components of a pipeline folder with its recorded hashes, where it records any.

    Raises:
        CheckpointError: names the file that differs.
    """
    path = folder / SUMS_FILE
    sums: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, expected in sums.items():
        if name.split("/")[0] in parts:
            expect_hash(folder / name, expected, "Restore it from the program's own files")


def expect_size(path: Path, expected: int, do: str = AGAIN) -> None:
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}", expected=f"{expected:,} bytes", do=do)
    got = path.stat().st_size
    if got != expected:
        what = "truncated" if got < expected else "too long"
        raise CheckpointError(f"{path} is {what}", expected=f"{expected:,} bytes", got=f"{got:,} bytes", do=do)


def expect_hash(path: Path, expected: str, do: str = AGAIN) -> None:
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}", do=do)
    got = hash_file(path)
    if got != expected:
        raise CheckpointError(f"{path} was altered", expected=f"sha256 {expected}", got=got, do=do)
