"""Download of a source's files from the Hub into a folder: disk space checked, hashes verified, resumed after a stop.

    for event in fetch(source, source_folder(root, source)): ...      # closing the iterator stops the download

A branch name is resolved once, and everything comes from that commit. Each file appears under its name only after its
size and hash agreed with the Hub's. Since unfinished files are named by content, an upstream change between two runs
costs only the files that changed.

A thread does the work, so that the iterator yields at least four times a second, and can be closed, also while the
network is silent. `huggingface_hub.snapshot_download` does the same without keeping unfinished files, checking hashes
or reporting to an iterator. Left out: mirrors, Xet, and sharing files with the Hub's own cache.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue

from huggingface_hub.errors import OfflineModeIsEnabled

from ideogram_app.catalog.sources import Source
from ideogram_app.checkpoints.prepared.manifest import FileRow
from ideogram_app.errors import AccessError, Cancelled, CheckpointError, DiskError
from ideogram_app.files import DISK_MARGIN, disk_free, full_disk_reported, locked, pieces, size_of, sync, write_text
from ideogram_app.hub.access import CLIENT_ERRORS, NETWORK_ERROR, Remote, RemoteFile, address, explain, look, retryable
from ideogram_app.hub.record import RECORD, DownloadRecord, fetched, read_record
from ideogram_app.hub.resume import WAITS, Chunk, download_file, pause
from ideogram_app.records import Event
from ideogram_app.text import gb
from ideogram_app.wire import to_json

UNFINISHED = ".fetch"
HEARTBEAT = 0.25  # seconds; the longest that a caller waits for an event
LOCK_SECONDS = 15  # a stopped thread may hold the lock until its silent connection times out
FIRST_ATTEMPTS = 4  # of the listing, before any byte came
RATE_SECONDS = 10.0  # the rate shown is that of about the last ten seconds


def fetch(
    source: Source, folder: Path, *, offline: bool = False, reserve_bytes: int = 0
) -> Generator[Event, None, None]:
    """Bring all files of a source into a folder, or do nothing where they are there.

    Closing the iterator stops the download; what came stays, and the next call resumes it.

    Args:
        reserve_bytes: disk space to leave for what is made of the files afterwards.

    Yields:
        Events of phase `fetch`. `done` and `total` count bytes of all files, `message` names the file, how far it is
        and which of how many; the same event comes again while nothing moves.

    Raises:
        AccessError: no token, licence not accepted, token too narrow, not found, offline, or no connection; says which,
            and on which page to act.
        DiskError: too little room for what is missing, the margin and `reserve_bytes`; or the disk filled up.
        CheckpointError: a file is not what the Hub says it is, twice.
        RequestError: another process fetches into this folder.
    """
    there = fetched(source, folder)
    if there:
        yield Event("fetch", done=there.size, total=there.size, message=f"{source.repository} is already there")
        return
    events: SimpleQueue[Event | None] = SimpleQueue()
    stop = threading.Event()
    meter = _Meter(events.put)
    download = _Download(source, folder, offline=offline, reserve=reserve_bytes, stop=stop, meter=meter)
    last: Event | None = Event("fetch", total=source.size, message=f"asking for {source.repository}")
    pool = ThreadPoolExecutor(1, thread_name_prefix="fetch")
    try:
        done = pool.submit(download.run)
        done.add_done_callback(lambda _: events.put(None))
        while last:
            yield last
            with suppress(Empty):  # the same event again
                last = events.get(timeout=HEARTBEAT)
        done.result()
    finally:
        stop.set()
        pool.shutdown(wait=False)


@dataclass
class _Download:
    source: Source
    folder: Path
    offline: bool
    reserve: int  # bytes
    stop: threading.Event
    meter: _Meter

    def run(self) -> None:
        filled_up = f"The disk filled up while {self.source.repository} was being fetched"
        try:
            with full_disk_reported(filled_up, self.folder, "Make room and continue: what has been fetched is kept"):
                self._run()
        except OSError as problem:  # the network's have become `AccessError`s by now
            raise DiskError(f"{self.folder} cannot be written", got=problem.strerror or str(problem)) from problem

    def _run(self) -> None:
        with locked(self.folder, f"{self.folder.name} is being fetched", LOCK_SECONDS):
            remote = self._look()
            self.meter.total, self.meter.count = remote.size, len(remote.files)
            self._check_disk(remote)
            old, source = read_record(self.source, self.folder), self.source
            record = DownloadRecord(source.repository, source.revision, remote.commit, source.patterns)
            if old is None:  # before the first byte, so that an unfinished folder is known as ours and may be deleted
                self._write(record)
            # Small files first: a configuration that this program cannot read then shows before the gigabytes.
            for file in sorted(remote.files, key=lambda file: file.size):
                self.meter.begin(file)
                row = self._existing(file, old) or self._fetched(file, remote.commit)
                record = replace(record, files=(*record.files, row))
                done = {row.path for row in record.files}
                later = [row for row in old.files if row.path not in done] if old else []  # of an earlier run
                self._write(replace(record, files=(*record.files, *later)))
            self._write(replace(record, complete=True))
            shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)
            left_out = f", left out {', '.join(remote.left_out)}" if remote.left_out else ""
            self.meter.say(f"{len(record.files)} files fetched and verified{left_out}")

    def _look(self) -> Remote:
        """The listing; a Hub that is only busy is asked again."""
        waits = iter(WAITS[: FIRST_ATTEMPTS - 1])
        while True:
            try:
                return look(self.source, offline=self.offline)
            except CLIENT_ERRORS as problem:
                wait = next(waits, None) if retryable(problem) else None
                if wait is None:
                    raise self._refusal(problem) from problem
            for _ in pause(wait):
                self._check_stop()

    def _check_disk(self, remote: Remote) -> None:
        missing = sum(file.size - self._bytes_there(file) for file in remote.files)
        needed, free = round(missing * DISK_MARGIN) + self.reserve, disk_free(self.folder)
        if needed > free:
            later = f" and {gb(self.reserve)} for what is made of it" if self.reserve else ""
            raise DiskError(
                f"There is too little room in {self.folder} for {self.source.repository}",
                expected=f"{gb(needed)} free: {gb(missing)} to fetch, a margin of {DISK_MARGIN - 1:.0%}{later}",
                got=gb(free),
                do="Make room, or choose another folder for the weights",
            )

    def _bytes_there(self, file: RemoteFile) -> int:
        """Bytes of a file that are on this disk; a whole file of another content will be overwritten."""
        whole = size_of(self.folder / file.path)
        return file.size if whole == file.size else min(max(size_of(self._part(file)), 0), file.size)

    def _part(self, file: RemoteFile) -> Path:
        return self.folder / UNFINISHED / (file.sha256 or file.blob)[:16]

    def _existing(self, file: RemoteFile, old: DownloadRecord | None) -> FileRow | None:
        """The row of a file that is there already: recorded by an earlier run, or put there by hand and hashed now."""
        path = self.folder / file.path
        if size_of(path) != file.size:
            return None
        for row in old.files if old else ():
            if row.path == file.path and file.sha256 and row.sha256 == file.sha256:
                self.meter.move(file.size, fresh=False)
                return row
        hashes = _Hashes(file)
        with path.open("rb") as stream:
            for data in pieces(stream):
                self._check_stop()
                hashes.update(data)
                self.meter.move(len(data), fresh=False, note="checking")
        if hashes.got == hashes.expected:
            return FileRow(file.path, file.size, hashes.sha256)
        self.meter.move(-file.size, fresh=False)
        return None

    def _fetched(self, file: RemoteFile, commit: str) -> FileRow:
        """Fetch one file and give it its name once its hash is right; damaged bytes are fetched once more."""
        part, path = self._part(file), self.folder / file.path
        for attempt in (1, 2):
            hashes = _Hashes(file)
            for chunk in self._chunks(file, commit, part):
                hashes.update(chunk.data)
                self.meter.move(len(chunk.data), fresh=not chunk.resumed, note=chunk.note)
            if hashes.got == hashes.expected:
                path.parent.mkdir(parents=True, exist_ok=True)
                sync(part)
                part.replace(path)
                return FileRow(file.path, file.size, hashes.sha256)
            part.unlink(missing_ok=True)
            self.meter.move(-file.size, fresh=False, note=f"damaged on the way, attempt {attempt}")
        raise CheckpointError(
            f"{file.path} of {self.source.repository} came damaged twice",
            expected=hashes.expected,
            got=hashes.got,
            do="Try again later; a proxy or virus scanner that changes downloads also does this",
        )

    def _chunks(self, file: RemoteFile, commit: str, part: Path) -> Iterator[Chunk]:
        """The file's bytes until the run is stopped, with the client's exceptions in words."""
        with closing(download_file(address(self.source, commit, file.path), part, file.size)) as chunks:
            try:
                for chunk in chunks:
                    self._check_stop()
                    yield chunk
            except (NETWORK_ERROR, OfflineModeIsEnabled) as problem:
                raise self._refusal(problem) from problem

    def _refusal(self, problem: Exception) -> AccessError:
        return AccessError(explain(self.source, problem).sentence)

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Cancelled("Fetching was stopped")

    def _write(self, record: DownloadRecord) -> None:
        write_text(self.folder / RECORD, to_json(record) + "\n")


class _Hashes:
    """Hashes of a file, updated while it comes: the one that the Hub has of it, and the one that is recorded."""

    def __init__(self, file: RemoteFile) -> None:
        self._sha256 = hashlib.sha256()
        self._blob = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)  # as git names a file
        self._by_blob = not file.sha256
        self.expected = f"git blob {file.blob}" if self._by_blob else f"sha256 {file.sha256}"

    def update(self, data: bytes) -> None:
        self._sha256.update(data)
        if self._by_blob:
            self._blob.update(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def got(self) -> str:
        return f"git blob {self._blob.hexdigest()}" if self._by_blob else f"sha256 {self.sha256}"


class _Meter:
    """Turns bytes into events, at most one for every heartbeat, with the rate of the last seconds."""

    def __init__(self, report: Callable[[Event], None]) -> None:
        self.total = self.count = self.done = 0  # bytes, files, bytes
        self._report, self._file, self._number, self._of_file = report, RemoteFile("", 0), 0, 0
        self._fresh, self._since, self._seconds, self._rate = 0, 0.0, 0.0, 0.0
        self._reported, self._note = 0.0, ""

    def begin(self, file: RemoteFile) -> None:
        self._file, self._number, self._of_file, self._reported = file, self._number + 1, 0, 0.0
        self.move(0)

    def move(self, count: int, *, fresh: bool = True, note: str = "") -> None:
        """Count bytes; only `fresh` ones, which came over the network now, count for the rate."""
        self.done += count
        self._of_file += count
        now = time.monotonic()
        if not self._rate and not self._fresh:
            self._since = now
        self._fresh += count if fresh else 0
        if now - self._reported >= HEARTBEAT or self._of_file == self._file.size or note != self._note:
            self._reported, self._note = now, note
            of = f"{gb(self._of_file)} of {gb(self._file.size)}, file {self._number} of {self.count}"
            self.say(f"{self._file.path}: {of}{', ' + note if note else ''}")

    def say(self, message: str) -> None:
        rate = self._measure()
        left = (self.total - self.done) / rate if rate else None
        self._report(Event("fetch", None, self.done, self.total, rate, left, message))

    def _measure(self) -> float | None:
        """Bytes a second since the first one, later an exponential average over about `RATE_SECONDS`."""
        seconds = time.monotonic() - self._since
        if seconds >= HEARTBEAT and (self._fresh or self._rate):
            self._seconds += seconds
            share = seconds / max(seconds, min(self._seconds, RATE_SECONDS))
            self._rate += share * (self._fresh / seconds - self._rate)
            self._fresh, self._since = 0, time.monotonic()
        return self._rate or None
