"""Files and folders: atomic writes, hashes, locks, free and taken bytes of a disk, and the default folders.

Without torch, because the page and its port come before torch. Left out: the user's home and system-wide folders. The
program lives in its own folder, and deleting that folder removes everything.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BufferedReader, FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ideogram_app.errors import CheckpointError, DiskError, RequestError, is_disk_full
from ideogram_app.text import gb

if TYPE_CHECKING:
    from PIL import Image

DATA_VARIABLE, OUTPUT_VARIABLE = "IDEOGRAM_APP_DATA", "IDEOGRAM_APP_OUTPUT_DIR"
DISK_MARGIN = 1.1  # free disk asked for, per byte that will be written
HASH_CHUNK = 2**22  # bytes read at once
NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # a file system that has no such thing, as some of the network
STAT_BLOCK = 512  # bytes; what `st_blocks` counts in, whatever the file system's own blocks
NOTE = "ideogram_app"  # the key of the text inside a picture


def project_folder() -> Path:
    """Parent of `ideogram_app/` and `assets/`."""
    return Path(__file__).resolve().parents[1]


def data_folder() -> Path:
    """Of weights: `data/` in the project's folder, unless the environment names another."""
    return _named(DATA_VARIABLE, "data")


def output_folder() -> Path:
    """Of pictures: `outputs/` in the project's folder, unless the environment names another."""
    return _named(OUTPUT_VARIABLE, "outputs")


def _named(variable: str, name: str) -> Path:
    named = os.environ.get(variable)
    return Path(named).expanduser() if named else project_folder() / name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Atomic write: the body fills a draft, which is synced and then renamed; a body that fails leaves none.

    What is no file and cannot be replaced, as /dev/stdout, is written to directly; of a link the target is replaced.

    Raises:
        OSError: no room, or no right to write there; the file is unchanged.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    path = path.resolve() if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")  # two processes may write one file at a time
    try:
        yield draft
        sync(draft)
        draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, atomically."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write plain values as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def write_png(path: Path, image: Image.Image, note: str) -> None:
    """Write a picture with a text inside it, under the key `NOTE`, atomically."""
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    notes.add_itxt(NOTE, note)
    with replacing(path) as draft:
        image.save(draft, "PNG", pnginfo=notes)


def sync(path: Path) -> None:
    """fsync a file, or the names in a folder; Windows cannot do the latter and needs not."""
    with suppress(PermissionError):
        handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
        try:
            os.fsync(handle)
        except OSError as problem:
            if problem.errno not in NO_SYNC:
                raise
        finally:
            os.close(handle)


def delete_folder(folder: Path) -> None:
    """Remove a folder; it is renamed first, so that a half deleted one never has its name."""
    renamed = folder.with_name(folder.name + ".old")
    shutil.rmtree(renamed, ignore_errors=True)
    if folder.is_dir():
        folder.rename(renamed)
        shutil.rmtree(renamed, ignore_errors=True)


@contextmanager
def full_disk_reported(what: str, folder: Path, do: str) -> Iterator[None]:
    """Turn the body's OSError of a full disk into a DiskError: `what`, the bytes free at `folder`, what to `do`."""
    try:
        yield
    except OSError as problem:
        if not is_disk_full(problem):
            raise
        raise DiskError(what, got=f"{gb(disk_free(folder))} free", do=do) from problem


def pieces(file: BufferedReader | FileIO, start: int = 0, stop: int = sys.maxsize) -> Iterator[bytes]:
    """Bytes `start` to `stop` of a file in chunks; fewer where the file ends early."""
    file.seek(start)
    while start < stop and (piece := file.read(min(HASH_CHUNK, stop - start))):
        start += len(piece)
        yield piece


def hash_span(file: BufferedReader | FileIO, start: int = 0, stop: int = sys.maxsize) -> str:
    """SHA-256 of bytes `start` to `stop` of a file."""
    digest = hashlib.sha256()
    for piece in pieces(file, start, stop):
        digest.update(piece)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb", buffering=0) as file:
        return hash_span(file)


def cached_hash(path: Path) -> str:
    """SHA-256 of a file, computed once per size and time of change. Raises CheckpointError where it is missing."""
    try:
        stat = path.stat()
    except FileNotFoundError as problem:
        raise CheckpointError(f"There is no file {path}") from problem
    return _hash_of_state(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_of_state(path: Path, size: int, changed: int) -> str:
    return hash_file(path)


@contextmanager
def locked(folder: Path, doing: str, seconds: float = 0) -> Iterator[None]:
    """Lock a folder by `<folder>.lock`; the operating system releases it when the process ends, however it ends.

    Args:
        doing: for the error of another holder, as `fp8 is being prepared`.
        seconds: to wait for another holder.

    Raises:
        RequestError: another process, or thread, still holds it.
        OSError: the lock file cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=seconds)
    except Timeout as problem:
        raise RequestError(f"{doing} by another process", do="Wait until that has finished, or stop it") from problem
    try:
        yield
    finally:
        lock.release()


def disk_free(folder: Path) -> int:
    """Bytes free on the disk of a folder that need not exist yet. Raises OSError where looking is not allowed."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def bytes_taken(folder: Path) -> int:
    """Bytes that files in a folder take, 0 where there is none; of sparse files only what was written."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return sum(min(stat.st_size, getattr(stat, "st_blocks", 2**50) * STAT_BLOCK) for stat in stats)


def size_of(path: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1


def hash_sources(base: Path, places: Iterable[Path]) -> str:
    """SHA-256 of Python sources below folders, or of files, by name below `base`; the first 16 digits. What cannot be
    read is left out."""
    digest = hashlib.sha256()
    for place in places:
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            with suppress(OSError):
                digest.update(file.relative_to(base).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def identity(folder: Path, parts: Iterable[str] = ("",)) -> str:
    """Identity of files in subfolders, without reading them: SHA-256 of the folder's path, names, sizes and times."""
    rows = [str(folder.absolute())]
    for part in sorted(parts):
        for path in sorted((folder / part).rglob("*")):
            if path.is_file():
                stat = path.stat()
                rows.append(f"{path.relative_to(folder).as_posix()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(rows).encode("utf-8", "surrogatepass")).hexdigest()  # names may be any bytes
