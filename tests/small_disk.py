"""A disk of a few megabytes, so that it is really full: a file system in memory, mounted where a test wants it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

BALLAST = "ballast"


@dataclass(frozen=True)
class SmallDisk:
    """Where it is mounted; it can be filled, emptied again, and made larger."""

    folder: Path

    def fill(self, leave: int = 0) -> None:
        """Write until it takes nothing more, then give back so many bytes."""
        path = self.folder / BALLAST
        with path.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(2**16)):
                    pass
            except OSError:
                pass
            file.truncate(max(0, file.tell() - leave))

    def empty(self) -> None:
        (self.folder / BALLAST).unlink()

    def resize(self, size: int) -> None:
        _mount("-o", f"remount,size={size}", self.folder)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[SmallDisk]:
    """A disk of so many bytes at `folder`; the test is skipped where nothing may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _mount("-t", "tmpfs", "-o", f"size={size}", "small-disk", folder)
    except (OSError, subprocess.CalledProcessError) as problem:
        told = getattr(problem, "stderr", "") or str(problem)
        pytest.skip(f"a full disk needs a small one, and nothing can be mounted here: {told.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


def _mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True, text=True)
