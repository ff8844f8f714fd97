"""History of comparisons on disk: one folder each, with its pictures, `comparison.json` and a contact sheet.

The folder's name is the time and four random digits, so names sort by age and two programs never share one. The JSON
names pictures relative to the folder: a folder can be moved, sent to somebody else, or deleted by hand.

Left out: an index, tags, search. The folders are the database, as in Fooocus, without its one log file a day.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ideogram_app.errors import RequestError
from ideogram_app.files import write_text
from ideogram_app.machine.hardware import Hardware
from ideogram_app.planning.planner import Plan
from ideogram_app.records import Request, Result
from ideogram_app.wire import from_json, to_json

COMPARISON_FILE = "comparison.json"
SHEET_FILE = "contact-sheet.png"
SHOWN = 60
_NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{4}")


@dataclass(frozen=True)
class Comparison:
    """Results of a request, in the order in which recipes were asked for, failed ones included."""

    request: Request
    hardware: Hardware
    plan: Plan
    results: tuple[Result, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A saved comparison. Images are paths into its folder."""

    id: str
    created: float
    comparison: Comparison
    folder: Path


def new_name() -> str:
    """Of a folder: the time and four random digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def find_entry(output: Path, name: str) -> Entry:
    """One comparison by the name of its folder.

    Raises:
        RequestError: there is none of that name, or what is there cannot be read.
    """
    found = read_entry(output / name) if _NAME.fullmatch(name) else None
    if found is None:
        raise RequestError("This comparison is not in the history", got=repr(name)[:60])
    return found


def write_entry(folder: Path, comparison: Comparison) -> None:
    """Save a comparison beside its pictures."""
    named = tuple(replace(r, image=Path(r.image).name if r.image else None) for r in comparison.results)
    write_text(folder / COMPARISON_FILE, to_json(replace(comparison, results=named)))


def read_entry(folder: Path) -> Entry | None:
    """A saved comparison, or None where the folder holds none that can be read."""
    file = folder / COMPARISON_FILE
    try:
        comparison = from_json(Comparison, file.read_text(encoding="utf-8"))
        created = file.stat().st_mtime
    except (OSError, UnicodeDecodeError, RequestError):
        return None
    results = tuple(_located(folder, result) for result in comparison.results)
    return Entry(folder.name, created, replace(comparison, results=results), folder)


def read_history(output: Path) -> Iterator[Entry]:
    """The newest comparisons, newest first."""
    if output.is_dir():
        names = sorted((path.name for path in output.iterdir() if _NAME.fullmatch(path.name)), reverse=True)
        yield from islice(filter(None, (read_entry(output / name) for name in names)), SHOWN)


def _located(folder: Path, result: Result) -> Result:
    """With the path of its picture; one that is gone becomes an error."""
    path = folder / Path(result.image).name if result.image else None
    if path and not path.is_file():
        return replace(result, image=None, error=f"The picture {path.name} is no longer in its folder.")
    return replace(result, image=str(path) if path else None)
