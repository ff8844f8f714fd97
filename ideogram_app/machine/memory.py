"""Memory in use now: of the first device and of RAM, by this process and by all others.

    now = memory_now(hardware)
    now.device_free, now.device_ours, now.host_free, now.host_ours

Asked every few seconds while a page is looked at, so it costs microseconds: it never imports torch, never starts a
driver, and reports nothing of a device that this process has not begun to use. What the machine *is*, hardware.py asks.

Left out: further devices, other processes by name (`Hardware.device_users`), and what happened between two readings.
What the driver may use: machine/memory_limit.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import psutil

from ideogram_app.machine.hardware import Hardware, asked, host_memory


@dataclass(frozen=True)
class MemoryNow:
    """Bytes; None where they are not known, and everywhere of a device that is not there.

    Attributes:
        device_total, host_total: that there are; within a container what it may use.
        device_free, host_free: that nobody holds.
        device_ours: held by torch's allocator, cached or in use. The driver's own share of this process, some hundred
            megabytes, is in nobody's count and stands with the others.
        host_ours: resident memory of this process.
    """

    device_total: int | None = None
    device_free: int | None = None
    device_ours: int | None = None
    host_total: int | None = None
    host_free: int | None = None
    host_ours: int | None = None

    @property
    def device_others(self) -> int | None:
        """Held by other programs and by the driver."""
        return _rest(self.device_total, self.device_free, self.device_ours)

    @property
    def host_others(self) -> int | None:
        """Held by other programs and by the system; files that the system merely remembers count as free."""
        return _rest(self.host_total, self.host_free, self.host_ours)


def memory_now(hardware: Hardware | None = None) -> MemoryNow:
    """Read the counters; hardware: the machine as it was detected, None while only RAM can be reported."""
    host_total, host_free = host_memory()
    total, free, ours = _device(hardware, sys.modules.get("torch"), host_free) if hardware else (None, None, None)
    return MemoryNow(
        device_total=total,
        device_free=free,
        device_ours=ours,
        host_total=host_total,
        host_free=host_free,
        host_ours=int(psutil.Process().memory_info().rss),
    )


def _device(hardware: Hardware, torch: Any, host_free: int) -> tuple[int | None, int | None, int | None]:
    """Total, free and ours of the first device; what torch has not touched yet keeps the numbers of detection."""
    total, free = hardware.device_memory_bytes, hardware.device_free_bytes
    if hardware.kind == "cpu" or total is None:
        return None, None, None
    if torch is None:
        return total, free, 0
    driver = torch.xpu if hardware.kind == "xpu" else torch.cuda
    if hardware.kind in ("cuda", "rocm", "xpu") and driver.is_initialized():
        index = hardware.device_index
        free, total = asked(lambda: driver.mem_get_info(index), (None, total))  # Intel's, or after a fault of the card
        return total, free, asked(lambda: int(driver.memory_reserved(index)), None)
    if hardware.kind == "mps":  # one memory for both: no more is free for the GPU than for anyone
        ours = asked(lambda: int(torch.mps.driver_allocated_memory()), 0)
        return total, max(0, min(total - ours, host_free)), ours
    return total, free, 0


def _rest(total: int | None, free: int | None, ours: int | None) -> int | None:
    if total is None or free is None:
        return None
    return max(0, total - free - (ours or 0))
