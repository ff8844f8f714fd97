"""Download record: what a folder of fetched files holds, with commit, sizes and hashes, read without the network.

    <root>/sources/<owner>--<name>/               plain files under the repository's own paths, no links
    <root>/sources/<owner>--<name>--<layout>/     the same, where a source is single files of a repository
    <root>/sources/<owner>--<name>/fetched.json   the record of what is there and verified
    <root>/sources/<owner>--<name>/.fetch/        the file that is being fetched, named by the hash it must have
    <root>/sources/<owner>--<name>.lock           the operating system's lock, held while it is being fetched

The record is first written before the first byte, so that an unfinished folder is known as ours and may be deleted.
huggingface_hub writes one small text file per file for this, in a hidden folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ideogram_app.catalog.sources import BRANCHES, Source
from ideogram_app.checkpoints.prepared.manifest import FileRow
from ideogram_app.errors import RequestError
from ideogram_app.files import bytes_taken, delete_folder, locked, size_of
from ideogram_app.wire import from_json

RECORD = "fetched.json"


@dataclass(frozen=True)
class DownloadRecord:
    """What was fetched into a folder.

    Attributes:
        revision: what was asked for; `commit` is what it was.
        patterns: the source's, so that a later version that wants more files notices.
        files: those that are there and verified; `complete`: whether these are all.
    """

    repository: str
    revision: str
    commit: str
    patterns: tuple[str, ...]
    files: tuple[FileRow, ...] = ()
    complete: bool = False

    @property
    def size(self) -> int:
        return sum(row.size for row in self.files)


def source_folder(root: Path, source: Source) -> Path:
    """Where a source's files lie, or would; sources of single files of one repository have a folder each."""
    name = source.repository.replace("/", "--")
    return root / "sources" / (name if source.branches == BRANCHES else f"{name}--{source.layout}")


def fetched(source: Source, folder: Path) -> DownloadRecord | None:
    """The record of a source whose files are all there; by sizes alone, without the network."""
    record = read_record(source, folder)
    if record is None or not record.complete or record.patterns != source.patterns:
        return None
    if source.revision not in (record.revision, record.commit):
        return None
    return record if all(size_of(folder / row.path) == row.size for row in record.files) else None


def delete_fetched(folder: Path) -> int:
    """Remove a folder of fetched files, finished or not; says how many bytes that freed.

    Raises:
        RequestError: it is being fetched right now, or is not a folder that this program filled.
    """
    if not folder.is_dir():
        return 0
    if not (folder / RECORD).is_file():
        raise RequestError(f"{folder} was not fetched by this program, so it is not deleted", expected=f"a {RECORD}")
    with locked(folder, f"{folder.name} is being fetched"):
        freed = bytes_taken(folder)
        delete_folder(folder)
    return freed


def read_record(source: Source, folder: Path) -> DownloadRecord | None:
    """The record of this source in a folder; None where there is none that can be read."""
    try:
        record = from_json(DownloadRecord, (folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RequestError):
        return None
    return record if record.repository == source.repository else None
