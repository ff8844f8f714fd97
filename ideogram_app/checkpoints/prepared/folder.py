"""One folder of prepared weights, wherever it is: being filled, published by rename, verified, deleted.

    <name>/            published: manifest.json, config.json files, weights, and what the licence asks for
    <name>.partial/    being prepared, or left by a run that ended early
    <name>.journal     what of the partial folder is done (journal.py)
    <name>.lock        held by the process that prepares, by the operating system's lock
    <name>.old/        the folder that was replaced, for the moment of replacing

A folder appears under its final name in one rename, after its files and manifest have reached the disk, so whatever has
that name was finished. Left out: which model and recipe belong where (store.py), other users' rights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ideogram_app.checkpoints.prepared.manifest import MANIFEST, Manifest, expect_hash, read_manifest, sync, write_text
from ideogram_app.errors import DiskError, RequestError, is_disk_full
from ideogram_app.folders import bytes_taken
from ideogram_app.wire import to_json


@dataclass(frozen=True)
class PreparedFolder:
    """A folder of prepared weights and what stands beside it while it is made.

    Attributes:
        final: the folder once it is published; its parents need not exist.
        title: what messages call it.
    """

    final: Path
    title: str

    @property
    def staging(self) -> Path:
        """The folder in which the files are made."""
        return self._beside(".partial")

    @property
    def journal(self) -> Path:
        """The file that says what of the staging folder is done."""
        return self._beside(".journal")

    @property
    def disk_free(self) -> int:
        """Bytes free on its disk."""
        folder = self.final.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the files alone; the operating system lets go of them when the process ends, however it ends.

        Raises:
            RequestError: another process, or thread, holds them.
            DiskError: not even an empty file finds room.
        """
        path = self._beside(".lock")
        lock = FileLock(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as problem:
            raise RequestError(
                f"{self.title} is being prepared by another process",
                do="Wait until that has finished, or stop it",
            ) from problem
        except OSError as problem:
            if not is_disk_full(problem):
                raise
            raise DiskError(f"There is no room left in {path.parent}", do="Make room and try again") from problem
        try:
            yield
        finally:
            lock.release()

    def publish(self, manifest: Manifest) -> Path:
        """Give the finished staging folder its final name, in place of what has it."""
        old = self._beside(".old")
        write_text(self.staging / MANIFEST, to_json(manifest))
        for folder in (self.staging, *(path for path in self.staging.rglob("*") if path.is_dir())):
            for path in folder.iterdir():
                if path.is_file():
                    sync(path)
            sync(folder)
        shutil.rmtree(old, ignore_errors=True)
        if self.final.exists():
            self.final.rename(old)
        self.staging.rename(self.final)
        sync(self.final.parent)
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
        return self.final

    def verify(self) -> None:
        """Read every byte and compare hashes.

        Raises:
            CheckpointError: names the first file that differs, the expected hash and the one it has.
        """
        for row in read_manifest(self.final).files:
            expect_hash(self.final / row.path, row.sha256)

    def delete(self) -> int:
        """Remove the folder, and what a preparation left of it; says how many bytes that freed. Hold the lock."""
        folders = [self.final, self.staging, self._beside(".old")]
        freed = sum(bytes_taken(folder) for folder in folders if folder.is_dir())
        if self.final.is_dir():  # leaves its name in one step, so that a half deleted folder never has it
            shutil.rmtree(folders[2], ignore_errors=True)
            self.final.rename(folders[2])
        for folder in folders[1:]:
            shutil.rmtree(folder, ignore_errors=True)
        self.journal.unlink(missing_ok=True)
        return freed

    def _beside(self, suffix: str) -> Path:
        return self.final.with_name(self.final.name + suffix)
