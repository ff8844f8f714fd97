"""Meter of seconds and peak bytes of each phase: the only file that synchronizes a device.

    with PhaseMeter(device) as meter:
        with meter.phase("encode"):
            ...
    meter.seconds["encode"], meter.peak_device_bytes, meter.peak_host_bytes

Times are wall-clock and the device has finished when a phase ends. Device peaks are the allocator's own counters.
A process has no peak that can be reset on every system, so its resident memory is sampled by a thread; a spike shorter
than the sampling interval can be missed, which torch's own allocator never is.

Left out: profiles by kernel family (the benchmark's work) and other processes' memory.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

SAMPLING_SECONDS = 0.01


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)


def release(device: torch.device) -> None:
    """Give freed memory back to the device and to the operating system, so that the next reading starts clean."""
    gc.collect()  # a tenth of a second and more: modules that somebody hooked are cycles
    empty_cache(device)


def empty_cache(device: torch.device) -> None:
    """The same without collecting garbage: what was freed, and no more."""
    if device.type in ("cuda", "mps", "xpu"):
        torch.get_device_module(device).empty_cache()
    trim()


def trim() -> None:
    """Give memory that this process has freed back to the operating system; what a device caches stays."""
    # glibc keeps freed pages otherwise; musl has no such call
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


def bytes_in_use(device: torch.device) -> int:
    """Bytes in use now: of tensors on a device that counts them (CUDA and ROCm), else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


class HostPeak:
    """Highest resident memory of this process, in bytes above its start, while the context is open."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self.start = self.highest = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, name="memory sampler", daemon=True)

    def __enter__(self) -> HostPeak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.highest = max(self.highest, self._process.memory_info().rss)

    @property
    def above_start(self) -> int:
        return self.highest - self.start

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLING_SECONDS):
            self.highest = max(self.highest, self._process.memory_info().rss)


@dataclass(frozen=True)
class MeasuredPeaks:
    """Highest memory of a run, in bytes; that of the fullest device where there are several.

    Attributes:
        device, reserved: used by tensors, and held by torch's allocator; None where the device does not count.
        host: of the process, above its start.
    """

    device: int | None = None
    reserved: int | None = None
    host: int = 0

    def with_those_of(self, other: MeasuredPeaks) -> MeasuredPeaks:
        """The higher ones, of two runs after one another."""

        def higher(one: int | None, two: int | None) -> int | None:
            return max((value for value in (one, two) if value is not None), default=None)

        device, reserved = higher(self.device, other.device), higher(self.reserved, other.reserved)
        return MeasuredPeaks(device, reserved, max(self.host, other.host))

    @property
    def memory(self) -> int:
        """Of the device where it has its own memory, else of the process."""
        return self.device if self.device is not None else self.host


class PhaseMeter:
    """Collects one run: seconds by phase and peaks over the whole of it. held: bytes of host memory that belong to the
    run and were allocated before it began; they count in host peaks."""

    def __init__(self, device: torch.device, held: int = 0) -> None:
        self.device, self._held = device, held
        self.seconds: dict[str, float] = {}
        self._host = HostPeak()
        self._device_peaks: tuple[int, int] | None = None
        self._device_start = 0

    def __enter__(self) -> PhaseMeter:
        if self.device.type == "cuda":
            self._device_start = torch.cuda.memory_allocated(self.device)
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        self._host.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._host.__exit__(*error)
        if self.device.type == "cuda":
            devices = range(torch.cuda.device_count())
            allocated = max(map(torch.cuda.max_memory_allocated, devices))
            self._device_peaks = allocated, max(map(torch.cuda.max_memory_reserved, devices))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to `seconds[name]`, the device's work included."""
        synchronize(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def peak_host_bytes(self) -> int:
        return self._host.above_start + self._held

    @property
    def peak_device_bytes(self) -> int | None:
        """Allocated, where the device counts it (CUDA and ROCm)."""
        return self._device_peaks[0] if self._device_peaks else None

    @property
    def peak_device_reserved_bytes(self) -> int | None:
        return self._device_peaks[1] if self._device_peaks else None

    @property
    def peaks(self) -> MeasuredPeaks:
        """All of them, once the context has ended."""
        return MeasuredPeaks(self.peak_device_bytes, self.peak_device_reserved_bytes, self.peak_host_bytes)

    @property
    def peak_above_start_bytes(self) -> int:
        """What the context added at its highest to what was held when it was opened."""
        if self.peak_device_bytes is not None:
            return self.peak_device_bytes - self._device_start
        return self.peak_host_bytes
