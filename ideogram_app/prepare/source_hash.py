"""Background SHA-256 of large source files, in a thread of its own while packing goes on.

hashlib lets go of Python's lock while it works, so on two cores the hash of an 18.5 GB source (13 s at the 1.4 GB/s of
one core of a Xeon with SHA instructions) hides behind minutes of packing, and the file is met in the page cache
by whichever of the two comes second. Left out: several files at once, which a disk would only answer more slowly.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ideogram_app.files import pieces


class BackgroundHashes:
    """sha256 of files, one after the other, in `seconds`; leaving the context early stops the thread."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.seconds = 0.0
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="source hash")
        self._found: dict[Path, Future[str]] = {path: self._pool.submit(self._hash, path) for path in files}

    def __enter__(self) -> BackgroundHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def finished(self) -> list[tuple[Path, str]]:
        return [(path, future.result()) for path, future in self._found.items() if future.done()]

    def wait(self, path: Path) -> str:
        """The hash of one file; OSError where it could not be read."""
        return self._found[path].result()

    def _hash(self, path: Path) -> str:
        started, digest = time.perf_counter(), hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            for piece in pieces(file):
                if self._stop.is_set():
                    break
                digest.update(piece)
        self.seconds += time.perf_counter() - started
        return digest.hexdigest()
