"""Copies from host memory to a device: pinned memory, a copy stream beside the compute stream, events between the two.

    AsyncCopyStream      CUDA, ROCm, XPU: copies from pinned memory on a stream of their own; events keep the order
    BlockingCopyStream   processors, Metal, and whatever has no streams: a copy is over when it returns
    StagingBuffers       a few pinned buffers in turn, between files and a device

An event is a point in the work given to a device. A copy waits for the event behind the last use of its target;
computing waits for the event behind a copy; the host waits for nothing, unless memory that it is about to overwrite is
still being read. Left out: copies back to the host, and copies between devices.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ideogram_app.errors import DeviceError

Event = torch.Event | None  # None: nothing to wait for
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device, whichever is the current one
NOT_PINNED = "The driver did not lock all of the RAM that weights are copied from, so copies to the device are slower."


class CopyStream(Protocol):
    """Copies to one device.

    Attributes:
        in_place: whether a device buffer is host memory, which files can be read into.
        threads: whether another thread than the one that computes may copy.
        notes: what did not go as it should, a sentence each.
    """

    device: torch.device
    in_place: bool
    threads: bool
    notes: list[str]

    def device_buffer(self, size: int) -> Tensor:
        """uint8 (size,) on the device; copy to it behind an `event` from after this call, for it may have been freed by
        work that the device has yet to do."""

    def pinned_buffer(self, size: int) -> Tensor:
        """uint8 (size,) in host memory, which copies start from."""

    def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
        """Copy host memory to a part of a device buffer, once the device is past `after`; gives the event behind it."""

    def event(self) -> Event:
        """Behind everything that the device was given to compute so far."""

    def wait(self, event: Event) -> None:
        """Have the device compute whatever it is given from now on behind the event."""

    def synchronize(self, event: Event) -> None:
        """Have the host wait until the device is past the event."""

    def close(self) -> None:
        """Wait for the device and unpin all memory; the buffers made here must no longer be used. DeviceError: the
        driver refuses."""


class BlockingCopyStream:
    """Copies that are over when they return."""

    def __init__(self, device: torch.device, make: Callable[[int, torch.device], Tensor] | None = None) -> None:
        """make: uint8 (size,) on a device, in place of torch's own allocation."""
        self.device, self.in_place = device, device.type == "cpu"
        self.threads = self.in_place  # two threads that use Metal's one stream end the process
        self.notes: list[str] = []
        self._make = make or (lambda size, where: torch.empty(size, dtype=torch.uint8, device=where))

    def device_buffer(self, size: int) -> Tensor:
        return self._make(size, self.device)

    def pinned_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
        target.copy_(source)
        return None

    def event(self) -> Event:
        return None

    def wait(self, event: Event) -> None:
        """Nothing is ever under way."""

    def synchronize(self, event: Event) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        """Nothing is pinned."""


class AsyncCopyStream:
    """Copies on a stream beside the one that computes."""

    in_place, threads = False, True

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.Stream(device)
        # A stream that is entered keeps the one before it in itself, not in the thread: one thread at a time.
        self._entering = threading.Lock()
        self.notes: list[str] = []
        self._pinned: list[tuple[Tensor, mmap.mmap]] = []

    def device_buffer(self, size: int) -> Tensor:
        # In the compute stream's share of the cached memory, so that what is freed is of use to computing.
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def pinned_buffer(self, size: int) -> Tensor:
        if self.device.type != "cuda":
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        # Pages of our own, pinned by the driver: PyTorch's allocator of pinned memory rounds up to powers of two, 256
        # MB for a block of Q4_K, 143 MB, and keeps what is freed.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
        pages = mmap.mmap(-1, size, **private)  # without the flags, Unix counts it as shared memory
        memory = torch.frombuffer(pages, dtype=torch.uint8, count=size)
        with torch.cuda.device(self.device):  # else the driver makes a context on the first device
            code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, PORTABLE))
        if code == 0:
            self._pinned.append((memory, pages))
            return memory
        with suppress(RuntimeError):  # CUDA reports the refusal once more, to whoever computes next
            _compute_something(self.device)
        if NOT_PINNED not in self.notes:
            self.notes.append(NOT_PINNED)
        return memory  # copies from it are correct, and slower

    def copy_async(self, source: Tensor, target: Tensor, after: Event) -> Event:
        with self._entering, self._stream:
            if after is not None:
                self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def event(self) -> Event:
        # Computing uses the device's default stream, which is the current one of every thread.
        return torch.accelerator.current_stream(self.device).record_event()

    def wait(self, event: Event) -> None:
        if event is not None:
            torch.accelerator.current_stream(self.device).wait_event(event)

    def synchronize(self, event: Event) -> None:
        if event is not None:
            event.synchronize()

    def close(self) -> None:
        self._stream.synchronize()
        torch.accelerator.current_stream(self.device).synchronize()
        pinned, self._pinned = self._pinned, []
        codes = [int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())) for memory, _ in pinned]
        if any(codes):
            raise DeviceError("The driver did not give locked RAM back", got=f"error {max(codes)}", do="Start again")


def copy_stream(device: torch.device) -> CopyStream:
    """The copies to a device: beside computing where it has streams."""
    return AsyncCopyStream(device) if device.type in ("cuda", "xpu") else BlockingCopyStream(device)


@dataclass(eq=False)
class _Buffer:
    """memory: pinned, uint8; copied: behind the last copy out of it."""

    memory: Tensor
    copied: Event = None


class StagingBuffers:
    """Pinned buffers of `size` bytes between files and a device, each filled again only when its last copy is over.
    For one thread."""

    def __init__(self, copies: CopyStream, count: int, size: int) -> None:
        self._copies, self._turn = copies, 0
        self._buffers = [_Buffer(copies.pinned_buffer(size)) for _ in range(count)]

    def copy(self, fill: Callable[[Tensor], None], target: Tensor, after: Event) -> Event:
        """Have a buffer filled and begin to copy it to the device, behind `after`; gives the event behind the copy.

        Args:
            fill: writes as many bytes as the target has, uint8 in host memory.
        """
        buffer = self._buffers[self._turn % len(self._buffers)]
        self._turn += 1
        self._copies.synchronize(buffer.copied)
        part = buffer.memory[: len(target)]
        fill(part)
        buffer.copied = self._copies.copy_async(part, target, after)
        return buffer.copied

    def synchronize(self) -> None:
        """Wait until no buffer is read from any more."""
        for buffer in self._buffers:
            self._copies.synchronize(buffer.copied)


def _compute_something(device: torch.device) -> None:
    torch.zeros(1, device=device).add_(1)
