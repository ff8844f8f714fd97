"""Weights on their way from disk to where they stay, read ahead in the order in which they will be asked for.

    with Transit(spans, lane_to(device)) as transit:
        for span in spans:
            tensor = transit.take(span)  # on the device

    disk --one thread--> ring of pinned buffers --copies on a stream of their own--> device
    disk --two threads--> host memory in which the weights stay

Threads read while whoever takes computes. Towards a device one fills a ring of a few pinned buffers, each again only
when its copy has ended. Towards host memory there is nothing in between, because a second copy would be the whole cost
again; there memory that was never used, whose pages the system hands out one by one, is what limits (on the machine of
benchmarks/results/loading.json a core takes them at 1.4 GB/s), so two share the work. They stop when `AHEAD` bytes wait
to be taken. Order is an advice: what is asked for out of turn comes when they get there, and what was never announced
is read at once.

safetensors' own loader maps a file and copies from pages that fault one by one, into memory that is not pinned. Left
out: reading past the cache of the operating system.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from ideogram_app.checkpoints.span import Span, open_in_order
from ideogram_app.errors import AppError
from ideogram_app.staging import AHEAD, BUFFERS, CHUNK

READERS = 2  # threads towards host memory


class Sent(Protocol):
    """A copy that was begun."""

    def wait(self) -> None:
        """Return when its source may be overwritten."""


class Lane(Protocol):
    """How bytes get to where they stay.

    Attributes:
        buffers: uint8 in host memory, filled in turn; none where bytes are read into their place.
    """

    device: torch.device
    buffers: Sequence[Tensor]

    def room(self, size: int) -> Tensor:
        """uint8 (size,) where they stay."""

    def send(self, buffer: Tensor, part: Tensor) -> Sent:
        """Begin to copy a buffer into a part of a room."""

    def receive(self, room: Tensor, last: Sent | None) -> Tensor:
        """The room, safe to compute with: whatever is computed from now on comes after its last copy."""


class HostLane:
    """Into host memory, and from there in one piece to the device where that is another."""

    buffers: Sequence[Tensor] = ()

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def send(self, buffer: Tensor, part: Tensor) -> Sent:
        raise NotImplementedError("nothing lies between the file and host memory")

    def receive(self, room: Tensor, last: Sent | None) -> Tensor:
        return room.to(self.device)


@dataclass(frozen=True)
class StreamSent:
    """A copy on a stream: `event` comes behind it."""

    event: torch.Event

    def wait(self) -> None:
        self.event.synchronize()


class StreamLane:
    """To a device with streams: through pinned buffers, on a stream beside the one that computes."""

    def __init__(self, device: torch.device, buffers: int = BUFFERS, size: int = CHUNK) -> None:
        self.device, self._stream = device, torch.Stream(device)
        self.buffers: Sequence[Tensor] = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(buffers)]

    def room(self, size: int) -> Tensor:
        with self._stream:  # so that memory which is freed and given out again keeps to the order of this stream
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def send(self, buffer: Tensor, part: Tensor) -> Sent:
        with self._stream:
            part.copy_(buffer, non_blocking=True)
        return StreamSent(self._stream.record_event())

    def receive(self, room: Tensor, last: Sent | None) -> Tensor:
        computing = torch.accelerator.current_stream(self.device)
        if isinstance(last, StreamSent):
            computing.wait_event(last.event)
        room.record_stream(computing)
        return room


def lane_to(device: torch.device | str) -> Lane:
    """The lane to a device: pinned and beside the computation where it has streams."""
    device = torch.device(device)
    return StreamLane(device) if device.type in ("cuda", "xpu") else HostLane(device)


class Transit:
    """Spans that threads read ahead, in their order; a context, which ends the threads.

    Args:
        spans: what will be taken, each once, in the order of use.
        lane: to where they stay.
        ahead: bytes that may wait to be taken.
    """

    def __init__(self, spans: Iterable[Span], lane: Lane, ahead: int = AHEAD) -> None:
        self._spans, self._lane, self._ahead = list(dict.fromkeys(spans)), lane, ahead
        self._ring = deque[tuple[Tensor, Sent | None]]((buffer, None) for buffer in lane.buffers)
        self._chunk = min((len(buffer) for buffer in lane.buffers), default=CHUNK)
        self._changed = threading.Condition()  # guards everything below
        self._left = deque(self._spans)  # not begun
        self._coming = set(self._spans)  # not taken
        self._arrived: dict[Span, tuple[Tensor, Sent | None]] = {}
        self._failed: dict[Span, Exception] = {}
        self._asked: set[Span] = set()
        self._bytes_ahead = 0  # begun and not taken
        self._running = 0  # threads
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name="transit", daemon=True)
            for _ in range(1 if lane.buffers else READERS)
        ]

    def __enter__(self) -> Transit:
        self._running = len(self._threads)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        for _, sent in self._ring:
            if sent:
                sent.wait()
        self._arrived.clear()

    def take(self, span: Span) -> Tensor:
        """The tensor of a span, on the lane's device; read at once where it was not announced or was taken before.

        Raises:
            CheckpointError: a file is missing, ends too early or cannot be read.
        """
        with self._changed:
            self._asked.add(span)
            self._changed.notify_all()
            self._changed.wait_for(lambda: span in self._arrived or span not in self._coming or not self._running)
            self._asked.discard(span)
            announced = span in self._coming
            self._coming.discard(span)
            there = self._arrived.pop(span, None)
            if there:
                self._bytes_ahead -= span.size
                self._changed.notify_all()
            elif announced and self._failed:
                raise self._failed.get(span) or next(iter(self._failed.values()))
        return span.shaped(self._lane.receive(*there)) if there else span.read().to(self._lane.device)

    # The rest runs in the threads.

    def _work(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._end)
            files: dict[Path, FileIO] = {}
            while span := self._next():
                try:
                    if span.path not in files:
                        files[span.path] = stack.enter_context(open_in_order(span.path))
                    there = self._carry(span, files[span.path])
                except (AppError, OSError, RuntimeError, MemoryError) as problem:  # raised again where it is taken
                    with self._changed:
                        self._failed[span] = problem
                    return
                with self._changed:
                    self._arrived[span] = there
                    self._changed.notify_all()

    def _next(self) -> Span | None:
        """The next span, once there is room for it or somebody asks for one that was not begun; None at the end."""

        def is_time() -> bool:
            if self._closing or self._failed or not self._left:
                return True
            has_room = not self._bytes_ahead or self._bytes_ahead + self._left[0].size <= self._ahead
            return has_room or not self._asked.isdisjoint(self._left)

        with self._changed:
            self._changed.wait_for(is_time)
            if self._closing or self._failed or not self._left:
                return None
            span = self._left.popleft()
            self._bytes_ahead += span.size
            return span

    def _end(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def _carry(self, span: Span, file: FileIO) -> tuple[Tensor, Sent | None]:
        """Bring one span under way: its room, and its last copy where there is one."""
        room, sent = self._lane.room(span.size), None
        for offset in range(0, span.size, self._chunk):
            if self._closing:
                break
            part = room[offset : offset + self._chunk]
            if not self._ring:
                span.fill(file, offset, part)
                continue
            buffer, before = self._ring.popleft()
            if before:
                before.wait()
            span.fill(file, offset, buffer[: len(part)])
            sent = self._lane.send(buffer[: len(part)], part)
            self._ring.append((buffer, sent))
        return room, sent
