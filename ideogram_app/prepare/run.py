"""Preparation run: from opened weights to a published folder, resumable; shared by transformers and components.

The order of its stages stands in transformers.py. The journal belongs to one task: recipe, protected layers, tuning,
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
from math import prod
from pathlib import Path

from ideogram_app import __version__
from ideogram_app.catalog.recipes import Recipe
from ideogram_app.checkpoints.prepared import storage as formats
from ideogram_app.checkpoints.prepared.file_plan import Unit
from ideogram_app.checkpoints.prepared.journal import Journal, MismatchError, UnitWriter, create_file, hash_parts
from ideogram_app.checkpoints.prepared.manifest import MANIFEST_FORMAT, FileRow, Manifest
from ideogram_app.checkpoints.prepared.packed_file import PackedFile
from ideogram_app.checkpoints.prepared.store import PreparedFolder
from ideogram_app.errors import CheckpointError, DiskError
from ideogram_app.files import DISK_MARGIN, disk_free, full_disk_reported, hash_file, write_json
from ideogram_app.prepare.calibration.tuning import UNTUNED, Tuning
from ideogram_app.prepare.notices import write_notices
from ideogram_app.prepare.packing import Packing
from ideogram_app.prepare.source_hash import BackgroundHashes
from ideogram_app.records import Event
from ideogram_app.text import gb

SETTLED_SECONDS = 0.01  # before this much time a rate says nothing: what an earlier run did takes none
# Of a byte of the finished files, the share of its work that is done once it is packed; the rest is its hash.
PACKED_SHARE = 0.9
END_BYTES = 2**20  # of a source file's beginning and end, hashed to know it again: headers stand at the beginning


@dataclass(frozen=True)
class Report:
    """What a run did."""

    model: str
    recipe: str
    folder: str
    seconds: float = 0.0
    passes: dict[str, float] = field(default_factory=dict)  # seconds of its stages; `hash the source` beside `pack`
    weights: int = 0  # packed in this run
    weights_per_second: float = 0.0  # while packing
    kept: int = 0  # tensors that an earlier run had done
    smoke: dict[str, float] = field(default_factory=dict)  # relative error of everything the smoke test compared
    files: tuple[FileRow, ...] = ()


@dataclass(frozen=True)
class PrepareTask:
    """What a run makes, and of what."""

    model: str
    recipe: Recipe  # the effective one, with the protected list that is used
    packings: tuple[Packing, ...]  # the files to fill
    sources: tuple[Path, ...]  # the files that are read
    folder: Path  # holds them all
    named: Path  # what was asked to be opened
    # Yields what it compared, and the relative error; raises MismatchError above a bound.
    smoke: Callable[[Packing], Iterator[tuple[str, float]]]
    tries: int  # how much `smoke` compares in all
    tuning: Tuning = UNTUNED
    copies: Mapping[str, Path] = field(default_factory=dict)  # path inside the published folder -> file to copy there


class PrepareRun:
    """From the source to the published folder: a method a stage, iterators of events that return what they made."""

    def __init__(self, prepared: PreparedFolder, task: PrepareTask) -> None:
        self.prepared, self.task, self.recipe, self.packings = prepared, task, task.recipe, task.packings
        self._seen = [_file_identity(path) for path in task.sources]
        copied = sum(path.stat().st_size for path in task.copies.values())
        self.written = copied + sum(packing.file_plan.size for packing in self.packings)
        self.meter = ProgressMeter(task.recipe.name, self.written)
        self.journal = Journal(prepared.journal, self._identity())
        self.weights = self.kept = 0

    def guarded(self) -> Generator[Event, None, Report]:
        """`run`, with a full disk put into words, and nothing left of files that do not match their source."""
        filled_up = f"The disk filled up while {self.recipe.name} was being prepared"
        again = "Make room and prepare it again: what is done is kept"
        try:
            with full_disk_reported(filled_up, self.prepared.final, again):
                return (yield from self.run())
        except MismatchError:
            shutil.rmtree(self.prepared.staging, ignore_errors=True)
            self.prepared.journal.unlink(missing_ok=True)
            raise

    def run(self) -> Generator[Event, None, Report]:
        """All stages: pack, hash the source beside that, smoke test, copy, hash what was written, publish."""
        self._check_disk()
        if not self.journal.resumed:
            shutil.rmtree(self.prepared.staging, ignore_errors=True)
            self.journal.begin()
        sources = yield from self._pack_and_hash_sources()
        smoke = yield from self._smoke_test()
        beside = yield from self._copy()
        files = yield from self._hash_files(beside)
        self._publish(sources, smoke, files)
        yield self.meter.event(
            self.meter.total - self.meter.done, f"{self.recipe.name} is ready in {self.prepared.final}"
        )
        return self._report(smoke, files)

    def _identity(self) -> dict[str, object]:
        return {  # what a journal must say of its task for this one to continue it
            "format": MANIFEST_FORMAT,
            "program": __version__,
            "recipe": self.recipe.name,
            "tuning": self.task.tuning.identity,
            "device": self.packings[0].device.type,  # rounds as others do to the last bit but one
            "source": self._seen,
            "headers": [hashlib.sha256(packing.file_plan.header).hexdigest() for packing in self.packings],
        }

    def _check_disk(self) -> None:
        units = [(packing, unit) for packing in self.packings for unit in packing.units]
        there = sum(packing.size(unit) for packing, unit in units if (packing.name, unit.name) in self.journal)
        needed, free = round((self.written - there) * DISK_MARGIN), disk_free(self.prepared.final)
        if needed > free:
            raise DiskError(
                f"There is too little room in {self.prepared.final.parent} for {self.recipe.name}",
                expected=f"{gb(needed)} free, a margin of {DISK_MARGIN - 1:.0%} included",
                got=f"{gb(free)}",
                do="Make room, or delete a recipe that is no longer needed",
            )

    def _pack_and_hash_sources(self) -> Generator[Event, None, tuple[FileRow, ...]]:
        """Fill every file; the source's files as rows of the manifest, hashed by a thread meanwhile."""
        unknown = [path for path in self.task.sources if str(path) not in self.journal.sources]
        with BackgroundHashes(unknown) as hashes:
            with self.meter.timed("pack"):
                for packing in self.packings:
                    for event in self._pack(packing):
                        yield event
                        for path, sha256 in hashes.finished():
                            if str(path) not in self.journal.sources:
                                self.journal.add_source(str(path), sha256)
            with self.meter.timed("wait for the hash of the source"):
                rows = tuple(self._source_row(path, hashes) for path in self.task.sources)
            self.meter.seconds["hash the source"] = hashes.seconds
        return rows

    def _pack(self, packing: Packing) -> Iterator[Event]:
        """Fill a branch's file; units that are in the journal and still match it stay."""
        settings = formats.branch_config(self.recipe, packing.component, packing.source.config)
        write_json(self._config(packing), settings, sort_keys=True)
        create_file(packing.path, packing.file_plan)
        written = PackedFile(packing.path, self.recipe, packing.component)
        with packing.path.open("r+b", buffering=0) as file:
            for unit in packing.units:
                share = PACKED_SHARE * packing.size(unit)
                if self.journal.is_intact(packing.name, unit, file, packing.file_plan):
                    self.kept += 1
                    yield self.meter.event(share, f"kept {unit.name}", fresh=False)
                    continue
                count = len(packing.runs(unit))
                for _ in self._fill(packing, unit, UnitWriter(file, packing.file_plan, unit), written):
                    yield self.meter.event(share / count, unit.name)

    def _fill(self, packing: Packing, unit: Unit, filling: UnitWriter, written: PackedFile) -> Iterator[None]:
        """Write a unit, yielding after every run of rows; it is in the journal before the last yield."""
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
                self.weights += prod(unit.shape) if unit.packed else 0
            yield

    def _source_row(self, path: Path, hashes: BackgroundHashes) -> FileRow:
        """A source file's row in the manifest; CheckpointError where it was changed since this run began."""
        sha256 = self.journal.sources.get(str(path)) or hashes.wait(path)
        if _file_identity(path) not in self._seen:
            raise CheckpointError(f"{path} was changed while it was being read", do="Prepare it again")
        folder = self.task.folder
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
        return FileRow(name, path.stat().st_size, sha256, path.stat().st_mtime_ns)

    def _smoke_test(self) -> Generator[Event, None, dict[str, float]]:
        """Relative errors of what the files compute; an event before the first, which reads a block twice, and each."""
        errors: dict[str, float] = {}
        yield Event("smoke", self.recipe.name, 0, self.task.tries, message="trying what was written")
        with self.meter.timed("smoke test"):
            for packing in self.packings:
                for name, error in self.task.smoke(packing):
                    errors[f"{packing.name} {name}"] = error
                    said = f"tried {name} of {packing.name}: off by {error:.1%}"
                    yield Event("smoke", self.recipe.name, len(errors), self.task.tries, message=said)
        return errors

    def _copy(self) -> Generator[Event, None, list[Path]]:
        """Notices, and the files that go along as they are: all that stands beside the packed ones."""
        beside = write_notices(self.prepared.staging, self.task.model, self.recipe.name, self.task.folder)
        for name, source in self.task.copies.items():
            target = self.prepared.staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            beside.append(target)
            yield self.meter.event(target.stat().st_size, f"copied {target.name}", phase="verify")
        return beside

    def _hash_files(self, beside: list[Path]) -> Generator[Event, None, tuple[FileRow, ...]]:
        """A row for every file of the folder; what a killed run left beside them is removed."""
        staging = self.prepared.staging
        hashes = {path: hash_file(path) for path in (*beside, *map(self._config, self.packings))}
        with self.meter.timed("hash the files"):
            for packing in self.packings:
                parts = [self.journal.hashes(packing.name, unit) for unit in packing.units]
                expected = {name: sha256 for part in parts for name, sha256 in part.items()}
                for size, sha256 in hash_parts(packing.path, packing.file_plan, expected):
                    hashes[packing.path] = sha256
                    yield self.meter.event((1 - PACKED_SHARE) * size, f"hashed {packing.path.name}", phase="verify")
        for path in staging.rglob("*"):
            if path.is_file() and path not in hashes:
                path.unlink()
        rows = sorted(hashes.items())
        return tuple(FileRow(path.relative_to(staging).as_posix(), path.stat().st_size, sha) for path, sha in rows)

    def _config(self, packing: Packing) -> Path:
        return self.prepared.staging / packing.name / "config.json"

    def _publish(self, sources: tuple[FileRow, ...], smoke: dict[str, float], files: tuple[FileRow, ...]) -> None:
        manifest = Manifest(
            format=MANIFEST_FORMAT,
            model=self.task.model,
            recipe=self.recipe.name,
            protected=self.recipe.protected,
            source=str(self.task.named),
            source_files=sources,
            files=files,
            app_version=__version__,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            calibration=self.task.tuning.calibration or self.task.tuning.identity,
            smoke=smoke,
        )
        with self.meter.timed("publish"):
            self.prepared.publish(manifest)

    def _report(self, smoke: dict[str, float], files: tuple[FileRow, ...]) -> Report:
        return Report(
            model=self.task.model,
            recipe=self.recipe.name,
            folder=str(self.prepared.final),
            seconds=time.monotonic() - self.meter.started,
            passes={name: round(value, 3) for name, value in self.meter.seconds.items()},
            weights=self.weights,
            weights_per_second=self.weights / max(self.meter.seconds["pack"], 1e-9),
            kept=self.kept,
            smoke=smoke,
            files=files,
        )


class ProgressMeter:
    """Turns finished bytes into events; the rate is that of this run's work. `seconds` are those of timed stages."""

    def __init__(self, recipe: str, total: int) -> None:
        self.recipe, self.total = recipe, total
        self.done = self._fresh = 0.0
        self.started = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started

    def event(self, size: float, message: str, fresh: bool = True, phase: str = "prepare") -> Event:
        """So many more bytes are done; `fresh` if this run did them."""
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
