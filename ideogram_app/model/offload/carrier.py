"""How bytes get from host memory to where a device computes: at once, or beside the computation.

    Direct     processors, and devices without streams that can be told apart: a copy is over when it returns
    Streamed   CUDA, ROCm, XPU: from locked memory, on a stream of its own; marks keep both streams in order

A mark is a point in the work given to a device. Copies wait for the mark behind the last use of a place; computing
waits for the mark behind a copy; the host waits for nothing, unless memory that it is about to overwrite is still
being read.

Locked memory is made of pages of its own that are registered with the driver. PyTorch's pinned memory comes in powers
of two: a block of Q4_K, 143 MB, would take 256. Where the driver refuses to lock, memory stays as it is: copies are
then correct and slower, and `notes` says so.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from ideogram_app.errors import DeviceError

Mark = torch.Event | None  # None: nothing to wait for
PORTABLE = 1  # cudaHostRegisterPortable: locked for every device, whichever is the current one


class Carrier(Protocol):
    """What a ring needs of a device.

    Attributes:
        direct: whether places are host memory, which can be read into.
        threads: whether another thread than the one that computes may copy.
        notes: what did not go as it should, a sentence each.
    """

    device: torch.device
    direct: bool
    threads: bool
    notes: list[str]

    def room(self, size: int) -> Tensor:
        """uint8 (size,) on the device."""

    def shelf(self, size: int) -> Tensor:
        """uint8 (size,) in host memory, which copies start from."""

    def send(self, source: Tensor, place: Tensor, after: Mark) -> Mark:
        """Copy host memory to a place, once the device is past a mark."""

    def mark(self) -> Mark:
        """Behind everything that was given to the device to compute."""

    def wait(self, mark: Mark) -> None:
        """What is computed from now on comes after the mark."""

    def settle(self, mark: Mark) -> None:
        """Return when the device is past the mark."""

    def close(self) -> None:
        """Wait for the device, and unlock all memory; what was made here must no longer be used."""


class Direct:
    """Copies that are over when they return; all by one thread, for Metal's one stream is not made for two."""

    def __init__(self, device: torch.device, make: Callable[[int, torch.device], Tensor] | None = None) -> None:
        """make: uint8 (size,) on a device, in place of torch's own allocation."""
        self.device, self.direct = device, device.type == "cpu"
        self.threads = self.direct
        self.notes: list[str] = []
        self._make = make or (lambda size, where: torch.empty(size, dtype=torch.uint8, device=where))

    def room(self, size: int) -> Tensor:
        return self._make(size, self.device)

    def shelf(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def send(self, source: Tensor, place: Tensor, after: Mark) -> Mark:
        place.copy_(source)
        return None

    def mark(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        """Nothing is ever under way."""

    def settle(self, mark: Mark) -> None:
        """Nothing is ever under way."""

    def close(self) -> None:
        """Nothing is locked."""


class Streamed:
    """Copies on a stream beside the one that computes."""

    direct, threads = False, True

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.Stream(device)
        self._entering = threading.Lock()  # a stream keeps what it took the place of in itself, not in the thread
        self.notes: list[str] = []
        self._locked: list[tuple[Tensor, mmap.mmap]] = []

    def room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def shelf(self, size: int) -> Tensor:
        if self.device.type != "cuda":
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
        pages = mmap.mmap(-1, size, **private)  # else Unix counts it as shared memory
        memory = torch.frombuffer(pages, dtype=torch.uint8, count=size)
        with torch.cuda.device(self.device):  # else the driver takes room for itself on the first one
            code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, PORTABLE))
        if code == 0:
            self._locked.append((memory, pages))
            return memory
        with suppress(RuntimeError):  # CUDA tells of the refusal once more, whoever computes next
            _compute_something(self.device)
        if not self.notes:
            self.notes.append("The driver did not lock all of the RAM that weights travel from, so copies are slower.")
        return memory

    def send(self, source: Tensor, place: Tensor, after: Mark) -> Mark:
        with self._entering, self._stream:
            if after is not None:
                self._stream.wait_event(after)
            place.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def mark(self) -> Mark:
        return torch.accelerator.current_stream(self.device).record_event()

    def wait(self, mark: Mark) -> None:
        if mark is not None:
            torch.accelerator.current_stream(self.device).wait_event(mark)

    def settle(self, mark: Mark) -> None:
        if mark is not None:
            mark.synchronize()

    def close(self) -> None:
        self._stream.synchronize()
        torch.accelerator.current_stream(self.device).synchronize()
        locked, self._locked = self._locked, []
        codes = [int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())) for memory, _ in locked]
        if any(codes):
            raise DeviceError("The driver did not give locked RAM back", got=f"error {max(codes)}", do="Start again")


def carrier_to(device: torch.device) -> Carrier:
    """The carrier to a device."""
    return Streamed(device) if device.type in ("cuda", "xpu") else Direct(device)


def _compute_something(device: torch.device) -> None:
    torch.zeros(1, device=device).add_(1)
