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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ideogram_app.checkpoints.prepared.manifest import MANIFEST, Manifest, expect_hash, read_manifest
from ideogram_app.files import bytes_taken, delete_folder, full_disk_reported, locked, sync, write_text
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

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the files alone; the operating system lets go of them when the process ends, however it ends.

        Raises:
            RequestError: another process, or thread, holds them.
            DiskError: not even an empty file finds room.
        """
        parent = self.final.parent
        with ExitStack() as held:
            with full_disk_reported(f"There is no room left in {parent}", parent, "Make room and try again"):
                held.enter_context(locked(self.final, f"{self.title} is being prepared"))
            yield

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
        freed = sum(bytes_taken(folder) for folder in (self.final, self.staging, self._beside(".old")))
        delete_folder(self.final)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.journal.unlink(missing_ok=True)
        return freed

    def _beside(self, suffix: str) -> Path:
        return self.final.with_name(self.final.name + suffix)
