"""Prefetch: tensors read from files by threads ahead of their use, to the device or to host memory.

    with prefetched(spans, device) as reader:
        file = file.read_with(reader)         these spans are read from what was prefetched

    disk --one thread--> pinned buffers of 16 MB --copies on a stream of their own--> device
    disk --two threads--> host memory in which the weights stay

Towards a device a thread goes through a few pinned buffers (machine/copies.py). Towards host memory there is nothing
between, because a second copy would be the whole cost again; there page faults of fresh memory are the limit (1.4 GB/s
a core on the machine of benchmarks/results/loading.json), so two threads share the work. Taking a tensor begins the
next ones, up to `AHEAD` bytes.

safetensors' own loader maps a file and copies from pages that fault one by one, into memory that is not pinned. Left
out: reading past the cache of the operating system.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import FileIO

import torch
from torch import Tensor

from ideogram_app.checkpoints.span import Reader, Span, open_in_order
from ideogram_app.machine.copies import CopyStream, Event, StagingBuffers, copy_stream
from ideogram_app.machine.staging import AHEAD, BUFFERS, CHUNK

READERS = 2  # threads towards host memory


@contextmanager
def prefetched(spans: Iterable[Span], device: torch.device | str) -> Iterator[Reader]:
    """A reader that prefetches these spans, each used once, in this order, to the device; any other is read when asked.

    Raises:
        CheckpointError: where a span is read: its file is missing, ends too early or cannot be read.
    """
    coming = list(spans)
    if not coming:  # nothing to make a copy stream for
        yield Span.read
        return
    copies = copy_stream(torch.device(device))
    try:
        with Prefetcher(coming, copies) as prefetcher:
            yield prefetcher.take
    finally:
        copies.close()


class Prefetcher:
    """Threads that read spans ahead, as a context; one thread takes each span once, in order.

    Args:
        ahead: bytes that may be read, or wait, before they are taken.
        chunk: bytes read at once.
    """

    def __init__(self, spans: Iterable[Span], copies: CopyStream, ahead: int = AHEAD, chunk: int = CHUNK) -> None:
        self._copies, self._ahead, self._chunk = copies, ahead, chunk
        through_buffers = copies.threads and not copies.in_place
        self._buffers = StagingBuffers(copies, BUFFERS, chunk) if through_buffers else None
        self._executor = ThreadPoolExecutor(1 if through_buffers else READERS, "prefetch")
        self._to_come = OrderedDict.fromkeys(spans)
        self._begun: OrderedDict[Span, Future[tuple[Tensor, Event]]] = OrderedDict()
        self._bytes = 0  # of what was begun
        self._closing = threading.Event()

    def __enter__(self) -> Prefetcher:
        self._begin_next()
        return self

    def __exit__(self, *problem: object) -> None:
        self._closing.set()
        self._executor.shutdown(wait=True, cancel_futures=True)
        if self._buffers:
            self._buffers.synchronize()  # before memory is freed that they are copied to
        self._to_come.clear()
        self._begun.clear()

    def take(self, span: Span) -> Tensor:
        """The tensor of a span, on the device; one that was not announced, or was taken before, is read to the host.

        Raises:
            CheckpointError: its file is missing, ends too early or cannot be read.
        """
        if span in self._to_come:
            self._begin(span)
        if span not in self._begun:
            return span.read()
        try:
            memory, copied = self._begun[span].result()
        finally:
            del self._begun[span]
            self._bytes -= span.size
            self._begin_next()
        self._copies.wait(copied)
        return span.shaped(memory.to(self._copies.device))  # moved only to Metal, where no other thread may copy

    def _begin_next(self) -> None:
        while self._to_come:
            span = next(iter(self._to_come))
            if self._bytes and self._bytes + span.size > self._ahead:
                return
            self._begin(span)

    def _begin(self, span: Span) -> None:
        del self._to_come[span]
        self._bytes += span.size
        self._begun[span] = self._executor.submit(self._read, span)

    # The rest runs in the threads.

    def _read(self, span: Span) -> tuple[Tensor, Event]:
        """The span's bytes, uint8 (size,), there once the event has passed."""
        with open_in_order(span.path) as file:
            if self._buffers:
                return self._through_buffers(span, file, self._buffers)
            memory = torch.empty(span.size, dtype=torch.uint8)
            for offset, part in self._parts(memory):
                span.fill(file, offset, part)
            return memory, None

    def _through_buffers(self, span: Span, file: FileIO, buffers: StagingBuffers) -> tuple[Tensor, Event]:
        memory, copied = self._copies.device_buffer(span.size), None
        free = self._copies.event()  # passes once whatever used this memory before is done
        try:
            for offset, part in self._parts(memory):
                copied = buffers.copy(partial(span.fill, file, offset), part, free)
        except BaseException:
            self._copies.synchronize(copied)  # before memory is freed that a buffer is copied to
            raise
        return memory, copied

    def _parts(self, memory: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Offset and view of each `chunk` bytes, until the context ends."""
        for offset in range(0, len(memory), self._chunk):
            if self._closing.is_set():
                return
            yield offset, memory[offset : offset + self._chunk]
