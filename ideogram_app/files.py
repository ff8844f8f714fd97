"""Files and folders: atomic writes, hashes, locks, free and taken bytes of a disk, and the default folders.

    project_folder, data_folder, output_folder     where things lie when nobody names a folder
    replacing, write_text, write_json, write_png   a file is there as a whole or not at all
    delete_folder, sync, full_disk_reported            so is a folder; and a full disk is told in words
    pieces, hash_span, hash_file, cached_hash      SHA-256 of files that are larger than memory
    locked                                         one process at a time
    disk_free, bytes_taken, size_of, identity      what is there, without reading it

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


# Default folders


def project_folder() -> Path:
    """The folder that holds `ideogram_app/` and `assets/`."""
    return Path(__file__).resolve().parents[1]


def data_folder() -> Path:
    """Where weights rest: `data/` in the project's folder, unless the environment names another."""
    return _named(DATA_VARIABLE, "data")


def output_folder() -> Path:
    """Where pictures are kept: `outputs/` in the project's folder, unless the environment names another."""
    return _named(OUTPUT_VARIABLE, "outputs")


def _named(variable: str, name: str) -> Path:
    named = os.environ.get(variable)
    return Path(named).expanduser() if named else project_folder() / name


# Atomic writes


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that it is there as a whole or not at all: the body fills a draft, which then takes the name.

    The draft has reached the disk before it is renamed, and a body that fails leaves none. What is no file and cannot
    be replaced, as /dev/stdout, is written to as it is; behind a link stands the file that is replaced.

    Raises:
        OSError: no room, or no right to write there; what had the name is unchanged.
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
    """Write text in UTF-8, as a whole or not at all."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write plain values as JSON that people can read, as a whole or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys) + "\n")


def write_png(path: Path, image: Image.Image, note: str) -> None:
    """Write a picture with a text inside it, under the key `ideogram_app`, as a whole or not at all."""
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    notes.add_itxt(NOTE, note)
    with replacing(path) as draft:
        image.save(draft, "PNG", pnginfo=notes)


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk; Windows cannot do the latter and needs not."""
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
    """Remove a folder; it leaves its name in one step, so that a half deleted one never has it."""
    doomed = folder.with_name(folder.name + ".old")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.is_dir():
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def full_disk_reported(what: str, folder: Path, do: str) -> Iterator[None]:
    """Put a disk that fills up in the body into words; other failures pass.

    Raises:
        DiskError: `what`, how much is free where `folder` is, and what to `do`.
    """
    try:
        yield
    except OSError as problem:
        if not is_disk_full(problem):
            raise
        raise DiskError(what, got=f"{gb(disk_free(folder))} free", do=do) from problem


# Hashes


def pieces(file: BufferedReader | FileIO, start: int = 0, stop: int = sys.maxsize) -> Iterator[bytes]:
    """The bytes of a place in a file, a few at a time; fewer than asked for where the file ends early."""
    file.seek(start)
    while start < stop and (piece := file.read(min(HASH_CHUNK, stop - start))):
        start += len(piece)
        yield piece


def hash_span(file: BufferedReader | FileIO, start: int = 0, stop: int = sys.maxsize) -> str:
    """SHA-256 of the bytes of a place, as the file has them."""
    digest = hashlib.sha256()
    for piece in pieces(file, start, stop):
        digest.update(piece)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file as it is now."""
    with path.open("rb", buffering=0) as file:
        return hash_span(file)


def cached_hash(path: Path) -> str:
    """SHA-256 of a file, computed once as long as its size and time of change stay.

    Raises:
        CheckpointError: the file is missing.
    """
    try:
        stat = path.stat()
    except FileNotFoundError as problem:
        raise CheckpointError(f"There is no file {path}") from problem
    return _hash_of_state(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_of_state(path: Path, size: int, changed: int) -> str:
    return hash_file(path)


# Locks


@contextmanager
def locked(folder: Path, doing: str, seconds: float = 0) -> Iterator[None]:
    """Hold a folder alone, by `<folder>.lock`; the operating system lets go of it when the process ends, however.

    Args:
        doing: what its holder does, as `fp8 is being prepared`.
        seconds: to wait for another holder.

    Raises:
        RequestError: another process, or thread, still holds it.
        OSError: not even an empty file finds room, or may be written.
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


# What is there


def disk_free(folder: Path) -> int:
    """Bytes free on the disk of a folder that need not exist yet.

    Raises:
        OSError: nobody may look.
    """
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def bytes_taken(folder: Path) -> int:
    """Bytes that files in a folder take, 0 where there is none; a file being filled takes only what was written."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return sum(min(stat.st_size, getattr(stat, "st_blocks", 2**50) * STAT_BLOCK) for stat in stats)


def size_of(path: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1


def identity(folder: Path, parts: Iterable[str] = ("",)) -> str:
    """Which files lie in some parts of a folder, without reading them: a hash of names, sizes and times.

    `make` tells what has changed in the same way: what is prepared again, in another recipe or from another source, is
    another, and so is the same in another folder.
    """
    rows = [str(folder.absolute())]
    for part in sorted(parts):
        for path in sorted((folder / part).rglob("*")):
            if path.is_file():
                stat = path.stat()
                rows.append(f"{path.relative_to(folder).as_posix()} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(rows).encode("utf-8", "surrogatepass")).hexdigest()  # names may be any bytes
