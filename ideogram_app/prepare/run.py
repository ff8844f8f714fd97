"""One run from opened weights to a published folder: what transformers and their companions share.

The order of its passes stands in transformers.py. The journal belongs to one job: recipe, protected layers, tuning,
program, and the source's files by size, time of change and their ends. Their full hashes are found while packing goes
on, for the manifest, so that an 18.5 GB source is not read twice in a row before anything starts.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from ideogram_app import __version__
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.checkpoints.prepared import storage as formats
from ideogram_app.checkpoints.prepared.file_plan import Unit
from ideogram_app.checkpoints.prepared.folder import PreparedFolder
from ideogram_app.checkpoints.prepared.journal import Filling, Journal, MismatchError, hash_parts, make_blank
from ideogram_app.checkpoints.prepared.manifest import MANIFEST_FORMAT, FileRow, Manifest
from ideogram_app.checkpoints.prepared.storage import PackedBranch
from ideogram_app.errors import CheckpointError, DiskError
from ideogram_app.files import DISK_MARGIN, disk_free, full_disk_reported, hash_file, write_json
from ideogram_app.prepare.notices import write_notices
from ideogram_app.prepare.packing import UNTUNED, Packing, Tuning
from ideogram_app.prepare.source_hash import BackgroundHashes
from ideogram_app.records import Event
from ideogram_app.text import gb

SETTLED_SECONDS = 0.01  # before this much time a rate says nothing: what is kept takes none
# Of a byte of the finished files, the share of its work that is done once it is packed; the rest is its hash.
PACKED_SHARE = 0.9
END_BYTES = 2**20  # of a source file's beginning and end, hashed to know it again: headers stand at the beginning


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        seconds: of the whole; `passes` of its parts, `hash the source` of a thread beside `pack`.
        weights: packed in this run; `weights_per_second` while packing.
        kept: tensors that an earlier run had done.
        smoke: the relative error of everything the smoke test compared.
    """

    model: str
    recipe: str
    folder: str
    seconds: float = 0.0
    passes: dict[str, float] = field(default_factory=dict)
    weights: int = 0
    weights_per_second: float = 0.0
    kept: int = 0
    smoke: dict[str, float] = field(default_factory=dict)
    files: tuple[FileRow, ...] = ()


@dataclass(frozen=True)
class PrepareTask:
    """What a run makes, and of what.

    Attributes:
        recipe: the effective one, with the protected list that is used.
        packings: the files to fill.
        sources: the files that are read; `folder` holds them all, `named` is what was asked to be opened.
        smoke: yields what it compared, and the relative error; raises MismatchError above a bound.
        tries: how much it compares in all.
        copies: path inside the published folder -> file that goes there as it is.
    """

    model: str
    recipe: Recipe
    packings: tuple[Packing, ...]
    sources: tuple[Path, ...]
    folder: Path
    named: Path
    smoke: Callable[[Packing], Iterator[tuple[str, float]]]
    tries: int
    tuning: Tuning = UNTUNED
    copies: Mapping[str, Path] = field(default_factory=dict)


class PrepareRun:
    """From the source to the published folder."""

    def __init__(self, place: PreparedFolder, work: PrepareTask) -> None:
        self.place, self.work, self.recipe, self.packings = place, work, work.recipe, work.packings
        self._seen = [_file_identity(path) for path in work.sources]
        copied = sum(path.stat().st_size for path in work.copies.values())
        self.written = copied + sum(packing.blank.size for packing in self.packings)
        self.meter = ProgressMeter(work.recipe.name, self.written)
        self.journal = Journal(place.journal, self._identity())
        self.smoke: dict[str, float] = {}
        self.weights = self.kept = 0
        self.files: tuple[FileRow, ...] = ()

    def guarded(self) -> Iterator[Event]:
        """`run`, with a full disk put into words, and nothing left of files that do not match their source."""
        filled_up = f"The disk filled up while {self.recipe.name} was being prepared"
        again = "Make room and prepare it again: what is done is kept"
        try:
            with full_disk_reported(filled_up, self.place.final, again):
                yield from self.run()
        except MismatchError:
            shutil.rmtree(self.place.staging, ignore_errors=True)
            self.place.journal.unlink(missing_ok=True)
            raise

    def run(self) -> Iterator[Event]:
        self._check_disk()
        if not self.journal.resumed:
            shutil.rmtree(self.place.staging, ignore_errors=True)
            self.journal.begin()
        unknown = [path for path in self.work.sources if str(path) not in self.journal.sources]
        with BackgroundHashes(unknown) as hashes:
            with self.meter.timed("pack"):
                for packing in self.packings:
                    for event in self._pack(packing):
                        yield event
                        self._note_sources(hashes)
            with self.meter.timed("wait for the hash of the source"):
                rows = tuple(self._source_row(path, hashes) for path in self.work.sources)
            self.meter.seconds["hash the source"] = hashes.seconds
        with self.meter.timed("smoke test"):
            yield from self._smoke()
        beside = write_notices(self.place.staging, self.work.model, self.recipe.name, self.work.folder)
        for path in self._copy():
            beside.append(path)
            yield self.meter.event(path.stat().st_size, f"copied {path.name}", phase="verify")
        with self.meter.timed("hash the files"):
            self.files = yield from self._hash_all(beside)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        work, tuning = self.work, self.work.tuning
        made = (MANIFEST_FORMAT, work.model, self.recipe.name, self.recipe.protected, str(work.named), rows, self.files)
        calibration = tuning.calibration or tuning.identity
        with self.meter.timed("publish"):
            final = self.place.publish(Manifest(*made, __version__, now, calibration, self.smoke))
        yield self.meter.event(self.meter.total - self.meter.done, f"{self.recipe.name} is ready in {final}")

    def report(self) -> Report:
        """What was done, once it is."""
        seconds, packing = self.meter.seconds, self.meter.seconds["pack"]
        return Report(
            self.work.model,
            self.recipe.name,
            str(self.place.final),
            time.monotonic() - self.meter.started,
            {name: round(value, 3) for name, value in seconds.items()},
            self.weights,
            self.weights / max(packing, 1e-9),
            self.kept,
            self.smoke,
            self.files,
        )

    def _identity(self) -> dict[str, object]:
        """What a journal must say of its job for this one to continue it."""
        return {
            "format": MANIFEST_FORMAT,
            "program": __version__,
            "recipe": self.recipe.name,
            "tuning": self.work.tuning.identity,
            "device": self.packings[0].device.type,  # rounds as others do to the last bit but one
            "source": self._seen,
            "headers": [hashlib.sha256(packing.blank.header).hexdigest() for packing in self.packings],
        }

    def _check_disk(self) -> None:
        units = [(packing, unit) for packing in self.packings for unit in packing.units]
        there = sum(packing.size(unit) for packing, unit in units if (packing.name, unit.name) in self.journal)
        needed, free = round((self.written - there) * DISK_MARGIN), disk_free(self.place.final)
        if needed > free:
            raise DiskError(
                f"There is too little room in {self.place.final.parent} for {self.recipe.name}",
                expected=f"{gb(needed)} free, a margin of {DISK_MARGIN - 1:.0%} included",
                got=f"{gb(free)}",
                do="Make room, or delete a recipe that is no longer needed",
            )

    def _pack(self, packing: Packing) -> Iterator[Event]:
        """Fill a branch's file; units that the journal vouches for stay."""
        settings = formats.branch_config(self.recipe, packing.component, packing.reader.config)
        config = self.place.staging / packing.name / "config.json"
        write_json(config, settings, sort_keys=True)
        make_blank(packing.path, packing.blank)
        written = PackedBranch(packing.path, self.recipe, packing.component)
        with packing.path.open("r+b", buffering=0) as file:
            for unit in packing.units:
                share = PACKED_SHARE * packing.size(unit)
                if self.journal.vouches(packing.name, unit, file, packing.blank):
                    self.kept += 1
                    yield self.meter.event(share, f"kept {unit.name}", fresh=False)
                    continue
                count = len(packing.runs(unit))
                for _ in self._fill(packing, unit, Filling(file, packing.blank, unit), written):
                    yield self.meter.event(share / count, unit.name)

    def _fill(self, packing: Packing, unit: Unit, filling: Filling, written: PackedBranch) -> Iterator[None]:
        """Write a unit, stopping for breath after every run of rows; it is in the journal before the last breath."""
        runs = packing.runs(unit)
        for number, rows in enumerate(runs, 1):
            tensor = packing.scaled(unit.source, rows)
            for part, packed in zip(unit.parts, packing.packed(unit, tensor), strict=False):
                filling.append(part.name, packed)
            packing.compare(written, unit, rows, tensor)
            if number == len(runs):
                for part_name, constant in formats.constants(unit).items():
                    filling.append(part_name, constant)
                self.journal.add(packing.name, unit, filling.hashes())
                self.weights += packing.weights(unit)
            yield

    def _note_sources(self, hashes: BackgroundHashes) -> None:
        for path, sha256 in hashes.finished():
            if str(path) not in self.journal.sources:
                self.journal.add_source(str(path), sha256)

    def _source_row(self, path: Path, hashes: BackgroundHashes) -> FileRow:
        """A source file's row in the manifest.

        Raises:
            CheckpointError: it was changed since this run began.
        """
        sha256 = self.journal.sources.get(str(path)) or hashes.wait(path)
        if _file_identity(path) not in self._seen:
            raise CheckpointError(f"{path} was changed while it was being read", do="Prepare it again")
        folder = self.work.folder
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
        return FileRow(name, path.stat().st_size, sha256, path.stat().st_mtime_ns)

    def _smoke(self) -> Iterator[Event]:
        """Compute with what was written; told before the first, which reads a block twice, and after each."""
        yield Event("smoke", self.recipe.name, 0, self.work.tries, message="trying what was written")
        for packing in self.packings:
            for name, error in self.work.smoke(packing):
                self.smoke[f"{packing.name} {name}"] = error
                said = f"tried {name} of {packing.name}: off by {error:.1%}"
                yield Event("smoke", self.recipe.name, len(self.smoke), self.work.tries, message=said)

    def _copy(self) -> Iterator[Path]:
        """Bring what goes along as it is."""
        for name, source in self.work.copies.items():
            target = self.place.staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            yield target

    def _hash_all(self, beside: list[Path]) -> Generator[Event, None, tuple[FileRow, ...]]:
        """A row for every file of the folder; what a killed run left beside them is removed."""
        hashes = {}
        for packing in self.packings:
            expected = {
                name: sha256
                for unit in packing.units
                for name, sha256 in self.journal.hashes(packing.name, unit).items()
            }
            for size, sha256 in hash_parts(packing.path, packing.blank, expected):
                hashes[packing.path] = sha256
                yield self.meter.event((1 - PACKED_SHARE) * size, f"hashed {packing.path.name}", phase="verify")
        small = [*beside, *(self.place.staging / packing.name / "config.json" for packing in self.packings)]
        hashes |= {path: hash_file(path) for path in small}
        for path in self.place.staging.rglob("*"):
            if path.is_file() and path not in hashes:
                path.unlink()
        return tuple(
            FileRow(path.relative_to(self.place.staging).as_posix(), path.stat().st_size, sha256)
            for path, sha256 in sorted(hashes.items())
        )


class ProgressMeter:
    """Turns finished bytes into events; the rate is that of work done in this run, not of what was kept.

    Attributes:
        seconds: of each pass that was timed.
    """

    def __init__(self, recipe: str, total: int) -> None:
        self.recipe, self.total = recipe, total
        self.done = self._fresh = 0.0
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the body to `seconds[name]`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    def event(self, size: float, message: str, fresh: bool = True, phase: str = "prepare") -> Event:
        """So many more bytes are done."""
        self.done = min(self.total, self.done + size)
        self._fresh += size if fresh else 0
        seconds = time.monotonic() - self.started
        rate = self._fresh / seconds if seconds > SETTLED_SECONDS and self._fresh else None
        left = (self.total - self.done) / rate if rate else None
        return Event(phase, self.recipe, round(self.done), self.total, rate, left, message)


def _file_identity(path: Path) -> list[object]:
    """Name, size, time of change and a hash of both ends of a source file: all that is known without reading it."""
    stat = path.stat()
    with path.open("rb") as file:
        ends = file.read(END_BYTES)
        file.seek(max(0, stat.st_size - END_BYTES))
        ends += file.read(END_BYTES)
    return [str(path), stat.st_size, stat.st_mtime_ns, hashlib.sha256(ends).hexdigest()]
