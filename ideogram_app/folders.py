"""Where things lie when nobody names a folder: the project, its weights and its pictures.

The page, the command line and the store take their defaults from here, so all three mean the same disk. Without torch,
because the page and its port come before torch.

Left out: the user's home and system-wide folders. The program lives in its own folder, and deleting that folder
removes everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

DATA_VARIABLE, OUTPUT_VARIABLE = "IDEOGRAM_APP_DATA", "IDEOGRAM_APP_OUTPUT_DIR"


def project_folder() -> Path:
    """The folder that holds `ideogram_app/` and `assets/`."""
    return Path(__file__).resolve().parents[1]


def data_folder() -> Path:
    """Where weights rest: `data/` in the project's folder, unless the environment names another."""
    return _named(DATA_VARIABLE, "data")


def output_folder() -> Path:
    """Where pictures are kept: `outputs/` in the project's folder, unless the environment names another."""
    return _named(OUTPUT_VARIABLE, "outputs")


def bytes_taken(folder: Path) -> int:
    """Bytes that files in a folder take, 0 where there is none; a file being filled takes only what was written."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return sum(min(stat.st_size, getattr(stat, "st_blocks", 2**50) * 512) for stat in stats)


def identity(folder: Path, parts: Iterable[str] = ("",)) -> str:
    """Which files lie in some parts of a folder, without reading them.

    Names, sizes and times, as `make` tells what has changed: what is prepared again, in another recipe or from another
    source, is another, and so is the same in another folder.
    """
    rows = [str(folder.absolute())]
    for part in sorted(parts):
        for path in sorted((folder / part).rglob("*")):
            if path.is_file():
                stat = path.stat()
                rows.append(f"{path.relative_to(folder).as_posix()} {stat.st_size} {stat.st_mtime_ns}")
    return sha256("\n".join(rows).encode()).hexdigest()


def _named(variable: str, name: str) -> Path:
    named = os.environ.get(variable)
    return Path(named).expanduser() if named else project_folder() / name
