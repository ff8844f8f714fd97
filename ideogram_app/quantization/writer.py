"""Source -> recipe -> files: `prepare` packs both transformers, one tensor at a time, and publishes them.

    hash the source -> write every tensor into its place -> read all back and compare -> hash -> rename

It is an iterator: stopping is not asking for the next event. What is done is journaled tensor by tensor with a hash of
its bytes; a later run, after a cancel or a kill at any moment, checks these hashes and continues behind them, so the
files come out the same as from one undisturbed run. Nothing has a final name before all of it was verified.

Peak memory is a few tensors: of the widest Linear in float32, with its packed twin. diffusers and llama.cpp hold or map
a whole model to convert it. Left out: choosing what to protect (recipes.py), calibration, several processes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from ideogram_app import __version__
from ideogram_app.architecture import Branch, find_model
from ideogram_app.checkpoints import formats
from ideogram_app.checkpoints.formats import Blank, PackedBranch, Unit
from ideogram_app.checkpoints.journal import Journal, make_blank, read_spans, write_at
from ideogram_app.checkpoints.manifest import (
    FORMAT,
    FileRow,
    Manifest,
    hash_file,
    read_manifest,
    sha256,
    source_files,
    source_rows,
    write_text,
)
from ideogram_app.checkpoints.readers import SourceBranch
from ideogram_app.checkpoints.sources import BRANCHES, local_folder
from ideogram_app.checkpoints.store import Store
from ideogram_app.errors import CheckpointError, DiskError
from ideogram_app.flow import Event
from ideogram_app.footprint import DISK_MARGIN, gb
from ideogram_app.recipes import Recipe, find_recipe

SETTLED_SECONDS = 0.01  # before this much time a rate says nothing: hashes may come from a cache
# |decoded - source| / |source| of one matrix, as a norm, at most. Far above what any weights give (normal ones: 0.027,
# 0.01, 0.006, 0.08) and far below what a wrong order, scale or type gives (about 1): this finds faults of the program
# or the machine; the quality of a recipe is measured on pictures. FP8 has a proof: half a step of 3 bits is 1/16.
LARGEST_ERROR = {"fp8": 0.07, "int8-w8a8": 0.3, "gguf-q8_0": 0.03, "gguf-q4_k": 0.3}


def prepare(store: Store, model_name: str, recipe_name: str, source: Path | None = None) -> Iterator[Event]:
    """Make a recipe's files, or do nothing where they are ready.

    Args:
        source: a diffusers pipeline folder; what ships with the program where None.

    Yields:
        Events of phase `prepare`. `done` and `total` count bytes of work: the source read once for its hash, the files
        written once and read twice. `message` is what was just done.

    Raises:
        RequestError: no such model or recipe, or another process prepares it.
        AccessError: the weights do not ship with the program and no folder was named.
        DiskError: too little room; says how much is needed.
        CheckpointError: the source is not what it should be, or what was written does not match it.
    """
    recipe, status = find_recipe(recipe_name), store.status(model_name, recipe_name)
    if status.state == "included" or (status.state == "ready" and source is None):
        yield _ready(recipe_name, status.bytes)
        return
    folder = local_folder(model_name, source)
    with store.lock(model_name, recipe_name):
        status = store.status(model_name, recipe_name)
        if status.state == "ready":
            made_from = read_manifest(store.path(model_name, recipe_name)).source_files
            if made_from == source_rows(folder):
                yield _ready(recipe_name, status.bytes)
                return
        try:
            yield from _Preparation(store, model_name, recipe, folder).run()
        except OSError as problem:
            if problem.errno != errno.ENOSPC:
                raise
            raise DiskError(
                f"The disk filled up while {recipe_name} was being prepared",
                got=f"{gb(store.disk_free)} free",
                do="Make room and prepare it again: what is done is kept",
            ) from problem


@dataclass
class _Job:
    """One branch: where it comes from, what it becomes."""

    name: str
    branch: Branch
    reader: SourceBranch
    units: list[Unit]
    blank: Blank
    path: Path
    unit_bytes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for unit in self.units:
            spans = (self.blank.spans[part.name] for part in unit.parts)
            self.unit_bytes[unit.name] = sum(stop - start for start, stop in spans)


class _Preparation:
    """A run from the source to the published folder."""

    def __init__(self, store: Store, model_name: str, recipe: Recipe, folder: Path) -> None:
        self.store, self.model_name, self.recipe, self.folder = store, model_name, recipe, folder
        self.staging = store.staging(model_name, recipe.name)
        branches = find_model(model_name).branches
        self.jobs = [self._job(name, branch) for name, branch in zip(BRANCHES, branches, strict=True)]
        self.read = sum(path.stat().st_size for path in source_files(folder))
        self.written = sum(job.blank.size for job in self.jobs)
        self.meter = _Meter(recipe.name, self.read + 3 * self.written)

    def run(self) -> Iterator[Event]:
        rows = []
        for path in source_files(self.folder):
            name = path.relative_to(self.folder).as_posix()
            rows.append(FileRow(name, path.stat().st_size, sha256(path)))
            yield self.meter.event(path.stat().st_size, f"read {name}")
        journal = self._journal(rows)
        self._check_disk(journal)
        if not journal.resumed:
            shutil.rmtree(self.staging, ignore_errors=True)
            journal.begin()
        for job in self.jobs:
            yield from self._write(job, journal)
        yield from self._check_all()
        files = yield from self._hash_all()
        protected = self.recipe.protected
        made = (FORMAT, self.model_name, self.recipe.name, protected, str(self.folder), tuple(rows), tuple(files))
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        final = self.store.publish(Manifest(*made, __version__, now))
        yield self.meter.event(self.meter.total - self.meter.done, f"{self.recipe.name} is ready in {final}")

    def _job(self, name: str, branch: Branch) -> _Job:
        reader = SourceBranch(self.folder / name, branch)
        made = formats.units(self.recipe, branch, reader.dtypes)
        dense = reader.dtypes[f"{next(branch.linears()).name}.bias"]
        blank = formats.blank(self.recipe, made, dense)
        path = self.staging / formats.branch_file(self.model_name, self.recipe, name)
        return _Job(name, branch, reader, made, blank, path)

    def _journal(self, rows: Sequence[FileRow]) -> Journal:
        """The journal of this very job; that of another source, version or recipe does not count."""
        headers = [hashlib.sha256(job.blank.header).hexdigest() for job in self.jobs]
        identity = {"format": FORMAT, "source": [row.sha256 for row in rows], "headers": headers}
        return Journal(self.store.journal(self.model_name, self.recipe.name), identity)

    def _check_disk(self, journal: Journal) -> None:
        there = sum(size for job in self.jobs for name, size in job.unit_bytes.items() if (job.name, name) in journal)
        needed, free = round((self.written - there) * DISK_MARGIN), self.store.disk_free
        if needed > free:
            raise DiskError(
                f"There is too little room in {self.store.root} for {self.recipe.name}",
                expected=f"{gb(needed)} free, a margin of {DISK_MARGIN - 1:.0%} included",
                got=f"{gb(free)}",
                do="Make room, or delete a recipe that is no longer needed",
            )

    def _write(self, job: _Job, journal: Journal) -> Iterator[Event]:
        """Fill a branch's file; units that the journal vouches for stay."""
        settings = formats.branch_config(self.recipe, job.branch, job.reader.config)
        write_text(self.staging / job.name / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
        make_blank(job.path, job.blank)
        with job.path.open("r+b", buffering=0) as file:
            for unit in job.units:
                spans = [job.blank.spans[part.name] for part in unit.parts]
                known = (job.name, unit.name) in journal
                if known and journal.vouches((job.name, unit.name), read_spans(file, spans)):
                    yield self.meter.event(job.unit_bytes[unit.name], f"kept {unit.name}", fresh=False)
                    continue
                parts = formats.pack(self.recipe, unit, [_finite(job, name) for name in unit.inputs])
                for (start, stop), part in zip(spans, parts, strict=True):
                    write_at(file, start, stop, part)
                journal.add((job.name, unit.name), read_spans(file, spans))
                yield self.meter.event(job.unit_bytes[unit.name], unit.name)

    def _check_all(self) -> Iterator[Event]:
        """Read every tensor back through the code that loads it, and compare with the source."""
        for job in self.jobs:
            packed = PackedBranch(job.path, self.recipe, job.branch)
            done = 0
            for name, tensor in packed.dense():
                self._expect_same(job, name, tensor)
                done += tensor.nbytes
            yield self.meter.event(done, f"checked {job.name}")
            for name in sorted(packed.packed):
                self._expect_close(job, f"{name}.weight", packed.weight(name).decoded())
                share = (job.blank.size - done) // len(packed.packed)
                yield self.meter.event(share, f"checked {name}")

    def _hash_all(self) -> Generator[Event, None, list[FileRow]]:
        """A row for every file of the folder; what a killed run left beside them is removed."""
        rows = []
        wanted = {path for job in self.jobs for path in (job.path, self.staging / job.name / "config.json")}
        for path in sorted(path for path in self.staging.rglob("*") if path.is_file()):
            if path not in wanted:
                path.unlink()
                continue
            name, size = path.relative_to(self.staging).as_posix(), path.stat().st_size
            rows.append(FileRow(name, size, hash_file(path)))
            yield self.meter.event(size, f"hashed {name}")
        return rows

    def _expect_same(self, job: _Job, name: str, got: Tensor) -> None:
        if not torch.equal(job.reader.tensor(name).to(got.dtype), got):
            raise self._mismatch(job, name, "the source's values", "others")

    def _expect_close(self, job: _Job, name: str, got: Tensor) -> None:
        source = job.reader.tensor(name).float()
        error, size = float((got - source).norm()), float(source.norm())
        bound = LARGEST_ERROR[self.recipe.name]
        if not (math.isfinite(error) and error <= bound * size):
            raise self._mismatch(job, name, f"a relative error up to {bound}", f"{error / size if size else error:.3g}")

    def _mismatch(self, job: _Job, name: str, expected: str, got: str) -> CheckpointError:
        """What was written is wrong: drop all of it, so that the next run starts afresh."""
        shutil.rmtree(self.staging)
        self.store.journal(self.model_name, self.recipe.name).unlink(missing_ok=True)
        return CheckpointError(
            f"{name} in {job.path.name} does not match its source {job.reader.folder}",
            expected=expected,
            got=got,
            do="The unfinished files were removed; check the source and prepare it again",
        )


class _Meter:
    """Turns finished bytes into events; the rate is that of work done in this run, not of what was kept."""

    def __init__(self, recipe: str, total: int) -> None:
        self.recipe, self.total, self.done, self._fresh = recipe, total, 0, 0
        self._started = time.monotonic()

    def event(self, size: int, message: str, fresh: bool = True) -> Event:
        self.done = min(self.total, self.done + size)
        self._fresh += size if fresh else 0
        seconds = time.monotonic() - self._started
        rate = self._fresh / seconds if seconds > SETTLED_SECONDS and self._fresh else None
        left = (self.total - self.done) / rate if rate else None
        return Event("prepare", self.recipe, self.done, self.total, rate, left, message)


def _finite(job: _Job, name: str) -> Tensor:
    """A tensor of the source; NaN and infinity would spread over whole rows."""
    tensor = job.reader.tensor(name)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{name} in {job.reader.folder} holds numbers that are not finite", do="Fetch the source again"
        )
    return tensor


def _ready(recipe: str, size: int) -> Event:
    return Event("prepare", recipe, size, size, message=f"{recipe} is ready")
