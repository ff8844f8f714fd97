"""Resumable download of one file from the Hub, with retries: continued after cuts, restarts and kills.

    for chunk in download_file(url, part, size): ...       # part grows; closing the iterator leaves it as it is

huggingface_hub gives the session, the headers, the token and the meaning of refusals. The loop is ours because its own
(`hf_hub_download`, from 1.0 on) writes to a file with a random name and deletes it when anything goes wrong: a closed
laptop, a reset connection or a killed program would each cost the whole of a 9 GB file. It also writes ten megabytes
at a time, and what was received of an unfinished ten is lost at every cut.

Left out: several connections at once, and Xet, the Hub's chunked protocol, which resumes only from its own cache.
Verification is the caller's, which gets every byte, those of an earlier run first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import constants, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from ideogram_app.errors import CheckpointError, DiskError, is_disk_full
from ideogram_app.hub.access import NETWORK_ERROR, retryable

# Seconds before each attempt since the last byte: five minutes in all, the longest time of the Hub's rate limit, and
# enough for a router to restart.
WAITS = (0.2, 1, 2, 4, 8, 15, *[30] * 9)
POLL = 0.1  # seconds between two chances to stop while waiting
READ_BACK = 2**22  # bytes
KEPT = "Make room and try again: what has been fetched is kept"


@dataclass(frozen=True)
class Chunk:
    """Bytes that are in the file now; `resumed` ones were there before. Without bytes, `note` says why it waits."""

    data: bytes = b""
    resumed: bool = False
    note: str = ""


def download_file(url: str, part: Path, size: int) -> Generator[Chunk, None, None]:
    """Bring `part` to `size` bytes, first handing out those it has.

    Raises:
        CheckpointError: the file at the Hub is not of the announced size.
        DiskError: it cannot be written, for another reason than a full disk.
        NETWORK_ERROR, OSError: no byte came for as long as `WAITS` say, or the Hub refuses; as huggingface_hub raises.
        OSError: the disk is full. Closing a file that holds unwritten bytes raises it once more: the caller words it.
    """
    with _opened(part, size) as file:
        while data := file.read(READ_BACK):
            yield Chunk(data, resumed=True)
        failures = 0
        while (have := file.tell()) < size:
            problem: Exception | None = None
            try:
                for data in _stream(url, have, size):
                    with _writing(f"{part} cannot be written any further", KEPT):
                        file.write(data)
                        file.flush()
                    yield Chunk(data)
            except NETWORK_ERROR as broken:
                if not retryable(broken):
                    raise
                problem = broken
            if file.tell() == size:
                return
            failures = 0 if file.tell() > have else failures + 1
            if failures == len(WAITS):
                raise problem or CheckpointError(f"{part.name} ends early", expected=f"{size:,} bytes", got=f"{have:,}")
            yield from pause(WAITS[failures])


def pause(seconds: float) -> Iterator[Chunk]:
    """Wait, in steps after which the caller can stop."""
    end = time.monotonic() + seconds
    note = "" if seconds < 1 else f"the line broke, trying again in {seconds:.0f} s"
    while (left := end - time.monotonic()) > 0:
        yield Chunk(note=note)
        time.sleep(min(POLL, left))


def _opened(part: Path, size: int) -> BinaryIO:
    """The partial file at its start, made where there is none, emptied where it is longer than it may be."""
    with _writing(f"{part} cannot be written"):
        part.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("ab+")
        if file.seek(0, os.SEEK_END) > size:
            file.truncate(0)
        file.seek(0)
    return file


@contextmanager
def _writing(what: str, do: str = "") -> Iterator[None]:
    """Errors of the disk in words; a full one is left to the caller."""
    try:
        yield
    except OSError as problem:
        if is_disk_full(problem):
            raise
        raise DiskError(what, got=problem.strerror or str(problem), do=do) from problem


def _stream(url: str, have: int, size: int) -> Iterator[bytes]:
    """The file's bytes from `have` on, never more than are missing."""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds without a byte, 10 unless the environment says otherwise
    # Redirects to another host are followed, and the session leaves the token behind at the border.
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as answer:
        ends = answer.headers.get("Content-Range", "").rpartition("/")[2]
        if answer.status_code != 416:
            hf_raise_for_status(answer)
        if answer.status_code == 200:
            ends = answer.headers.get("Content-Length", "")
        if (ends.isdigit() and int(ends) != size) or answer.status_code == 416:
            raise CheckpointError(
                f"The file at {url.partition('?')[0]} is not of the size that the Hub announces",
                expected=f"{size:,} bytes",
                got=f"{ends} bytes",
                do="Try again later: the file may be in the middle of being replaced",
            )
        skip = have if answer.status_code == 200 else 0  # a server that cannot continue begins again
        left = size - have
        for data in answer.iter_bytes():
            data, skip = data[skip:], max(0, skip - len(data))
            if data:
                yield data[:left]
                left -= len(data)
